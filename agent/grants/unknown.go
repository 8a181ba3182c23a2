package grants

import (
	"fmt"
	"slices"
	"strings"
)

// maxRepeated is how many characters of a caller's own an answer repeats: all of a user-assigned identity's resource
// ID.
const maxRepeated = 300

// Quoted repeats what a caller sent, with its escapes visible, as far as people read. Of what is longer it repeats both
// ends: a resource ID has the name at its end.
func Quoted(text string) string {
	if runes := []rune(text); len(runes) > maxRepeated {
		const half = maxRepeated / 2
		return fmt.Sprintf("%q…%q", string(runes[:half]), string(runes[len(runes)-half:]))
	}
	return fmt.Sprintf("%q", text)
}

// notFound says that no identity is what r names, and recognises what was given in the wrong place. granted are the
// identities that the caller may name.
func (a *Authorizer) notFound(r Request, granted []*Identity) string {
	asked, field := r.IdentityText(), r.identityField()
	what := field
	if r.Parameter != "" {
		what = r.Parameter
	}
	text := fmt.Sprintf("Identity not found: no [[identity]] of the configuration has the %s %s", what, Quoted(asked))
	plain := strings.Trim(asked, " \t\r\n{}()\"'`<>")
	for i := range a.rules.Identities {
		identity := &a.rules.Identities[i]
		if is := identity.recognise(field, plain); is != "" {
			return text + ": that is " + is + identity.named(field, slices.Contains(granted, identity))
		}
	}
	return text
}

// recognise says what a text is to i that was given in the place of the value of field; or "".
func (i *Identity) recognise(field, text string) string {
	for _, id := range []struct{ field, what, value string }{
		{"name", "the name", i.Name}, {"client_id", "the client ID", i.ClientID},
		{"object_id", "the object ID", i.ObjectID}, {"resource_id", "the resource ID", i.ResourceID},
	} {
		switch {
		case id.value == "" || !strings.EqualFold(strings.Trim(id.value, "/"), strings.Trim(text, "/")):
		case id.field != field:
			return fmt.Sprintf("%s of one, and not its %s", id.what, strings.ReplaceAll(field, "_id", " ID"))
		case field == "name" && id.value != text:
			return "the name of one in other letters"
		case strings.HasPrefix(id.value, "/") && !strings.EqualFold(id.value, text):
			return id.what + " of one with other slashes around it"
		default:
			return id.what + " of one with other characters around it"
		}
	}
	return ""
}

// named says by what i is named in field, to a caller that may name it.
func (i *Identity) named(field string, granted bool) string {
	value := map[string]string{
		"name": i.Name, "client_id": i.ClientID, "object_id": i.ObjectID, "resource_id": i.ResourceID,
	}[field]
	if !granted || value == "" {
		return ""
	}
	return ", which is " + value
}
