package api

import (
	"fmt"
	"regexp"
	"strings"
)

// NearMiss is a resource that a grant names and that differs from the one asked for in its spelling alone.
type NearMiss struct {
	Grant    int      `json:"grant"`           // its number, from 1
	Place    string   `json:"place,omitempty"` // file and line; without the folder on a token socket
	Caller   string   `json:"caller"`          // whom it is for, in words
	Spelling string   `json:"spelling"`        // as the grant has it
	Differs  []string `json:"differs"`         // in what, in words
	Usual    string   `json:"usual,omitempty"` // which of the two is Azure's own, where the other is not
	Advice   string   `json:"advice"`          // all that in words, with what to do
}

// Suggestion is what an administrator can write so that a caller gets what it was denied, if it should have it.
type Suggestion struct {
	AddTo *GrantPlace `json:"add_to,omitempty"` // the grant that the resource can be added to
	// Grants do the same, beside those that are there. The first has the resource that was asked for.
	Grants []NewGrant `json:"grants"`
	// Repeats says that Grants have more than that: what grants of a broader kind allow now, and then no longer.
	Repeats bool   `json:"repeats,omitempty"`
	TOML    string `json:"toml"`    // Grants as the configuration has them
	Command string `json:"command"` // a call of perceptctl for each, in one line that a shell runs
}

// Resources returns those of the first grant: the one that was asked for comes first.
func (s *Suggestion) Resources() []string {
	if len(s.Grants) == 0 {
		return nil
	}
	return s.Grants[0].Resources
}

// GrantPlace is where a grant is written.
type GrantPlace struct {
	Number int    `json:"number"` // from 1, in the order of the configuration
	Place  string `json:"place,omitempty"`
}

func (p GrantPlace) String() string {
	if p.Place == "" {
		return fmt.Sprintf("grant %d", p.Number)
	}
	return fmt.Sprintf("grant %d (%s)", p.Number, p.Place)
}

// NewGrant is a grant that could be written.
type NewGrant struct {
	Caller    GrantCaller `json:"caller"`
	Identity  string      `json:"identity"` // empty: which one is for an administrator to say
	Resources []string    `json:"resources"`
}

// GrantCaller is whom a grant is for: exactly one is set.
type GrantCaller struct {
	Module string  `json:"module,omitempty"`
	Unit   string  `json:"unit,omitempty"`
	Image  string  `json:"container_image,omitempty"`
	User   string  `json:"user,omitempty"`
	UID    *uint32 `json:"uid,omitempty"`
	Group  string  `json:"group,omitempty"`
	GID    *uint32 `json:"gid,omitempty"`
}

// key returns the key of a grant's caller in the configuration, and its value.
func (c GrantCaller) key() (key, value string) {
	switch {
	case c.Module != "":
		return "module", c.Module
	case c.Unit != "":
		return "unit", c.Unit
	case c.Image != "":
		return "container_image", c.Image
	case c.User != "":
		return "user", c.User
	case c.UID != nil:
		return "uid", fmt.Sprint(*c.UID)
	case c.Group != "":
		return "group", c.Group
	case c.GID != nil:
		return "gid", fmt.Sprint(*c.GID)
	}
	return "", ""
}

// noIdentity stands where an administrator has to say which identity a grant is for.
const noIdentity = "NAME"

// TOML returns the grant as the configuration has it. Its values are of characters that Go and TOML quote alike.
func (g NewGrant) TOML() string {
	key, value := g.Caller.key()
	if key != "uid" && key != "gid" {
		value = fmt.Sprintf("%q", value)
	}
	identity := g.Identity
	if identity == "" {
		identity = noIdentity
	}
	resources := make([]string, len(g.Resources))
	for i, resource := range g.Resources {
		resources[i] = fmt.Sprintf("%q", resource)
	}
	return fmt.Sprintf("[[grant]]\ncaller    = { %s = %s }\nidentity  = %q\nresources = [%s]\n",
		key, value, identity, strings.Join(resources, ", "))
}

// Command returns the call of perceptctl that writes the grant. A shell reads each value as one word, whatever is in
// it.
func (g NewGrant) Command() string {
	key, value := g.Caller.key()
	switch key {
	case "container_image":
		key = "container-image"
	case "uid":
		key = "user"
	case "gid":
		key = "group"
	}
	identity := g.Identity
	if identity == "" {
		identity = noIdentity
	}
	text := fmt.Sprintf("perceptctl grants add --%s %s --identity %s", key, shellWord(value), shellWord(identity))
	for _, resource := range g.Resources {
		text += " --resource " + shellWord(resource)
	}
	return text
}

var plainWord = regexp.MustCompile(`^[0-9A-Za-z_][0-9A-Za-z_.:/@%+=,-]*$`)

// shellWord quotes a text for a shell where that would read it as anything but one word.
func shellWord(text string) string {
	if plainWord.MatchString(text) {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}
