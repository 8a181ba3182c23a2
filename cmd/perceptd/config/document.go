package config

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"perceptd/agent/grants"
)

// document is one configuration file as it is written. Pointers tell a missing key from a zero.
type document struct {
	Source sourceDocument `toml:"source"`
	Tokens struct {
		SDKLife any `toml:"sdk_life"` // for setDuration
		Spread  any `toml:"spread"`   // the same

		LostRecord *string `toml:"lost_record"`
	} `toml:"tokens"`
	Resource []struct {
		URI        string   `toml:"uri"`
		Alternates []string `toml:"alternates"`
	} `toml:"resource"`
	Identity []struct {
		Name       string `toml:"name"`
		Default    bool   `toml:"default"`
		ClientID   string `toml:"client_id"`
		ObjectID   string `toml:"object_id"`
		ResourceID string `toml:"resource_id"`
	} `toml:"identity"`
	Grant []struct {
		Caller    grantCaller `toml:"caller"`
		Identity  string      `toml:"identity"`
		Resources []string    `toml:"resources"`
		Prefetch  bool        `toml:"prefetch"`
	} `toml:"grant"`
	Callers  callersDocument  `toml:"callers"`
	Module   []moduleDocument `toml:"module"`
	Loopback loopbackDocument `toml:"loopback"`
	IoTHub   iothubDocument   `toml:"iothub"`
}

// checkTOML says why a file is not TOML; nil: it is.
func checkTOML(file string, text []byte) error {
	var all map[string]any
	return inFile(file, toml.Unmarshal(text, &all))
}

// decode is strict: a key that nobody reads is an error, since it may be a misspelt grant.
func decode(file string, text []byte, doc *document) error {
	return inFile(file, toml.NewDecoder(strings.NewReader(string(text))).DisallowUnknownFields().Decode(doc))
}

// inFile says where in a file an error of the decoder is.
func inFile(file string, err error) error {
	var unknown *toml.StrictMissingError
	var syntax *toml.DecodeError
	switch {
	case errors.As(err, &unknown):
		var faults []error
		for i := range unknown.Errors {
			line, _ := unknown.Errors[i].Position()
			faults = append(faults, fmt.Errorf("%s:%d: unknown key %s%s",
				file, line, key(unknown.Errors[i].Key()), hint(unknown.Errors[i].Key())))
		}
		return errors.Join(faults...)
	case errors.As(err, &syntax):
		line, column := syntax.Position()
		return fmt.Errorf("%s:%d:%d: %s%s", file, line, column, atKey(syntax.Key()), inWords(syntax))
	case err != nil:
		return fmt.Errorf("%s: %s", file, strings.TrimPrefix(err.Error(), "toml: "))
	}
	return nil
}

func key(k toml.Key) string { return strings.Join(k, ".") }

func atKey(k toml.Key) string {
	if len(k) == 0 {
		return ""
	}
	return key(k) + ": "
}

// inWords is what a DecodeError says, without the Go type that a value did not fit.
func inWords(err *toml.DecodeError) string {
	text := strings.TrimPrefix(err.Error(), "toml: ")
	kind, _, wrongType := strings.Cut(strings.TrimPrefix(text, "cannot decode TOML "), " into struct field ")
	if wrongType {
		return fmt.Sprintf("its value cannot be of type %s", kind)
	}
	return text
}

// hint says what was probably meant by an unknown key.
func hint(k toml.Key) string {
	switch k[0] {
	case "source":
		return ": [source] has kind, endpoint, speed, rollover and spread"
	case "tokens":
		return ": [tokens] has sdk_life, spread and lost_record"
	case "identity":
		return ": [[identity]] has name, default, client_id, object_id and resource_id"
	case "resource":
		return ": [[resource]] has uri and alternates"
	case "grant":
		return ": [[grant]] has caller (by module, unit, container_image, user, uid, group or gid), " +
			"identity, resources and prefetch"
	case "callers":
		return ": [callers] has engine, cgroup_parents, requests_per_second and young"
	case "loopback":
		return ": [loopback] has address"
	case "iothub":
		return iothubHint(k)
	case "module":
		return ": [[module]] has name, require and container"
	}
	return ": the tables are [source], [tokens], [callers], [loopback], [iothub], " +
		"[[identity]], [[grant]], [[resource]] and [[module]]"
}

// take adds a document to c.
func (c *Config) take(doc document, where *positions) error {
	faults := []error{
		setDuration(&c.Rules.SDKLife, doc.Tokens.SDKLife, "tokens.sdk_life", where),
		setDuration(&c.Rules.Spread, doc.Tokens.Spread, "tokens.spread", where),
		setDuration(&c.Source.Spread, doc.Source.Spread, "source.spread", where),
	}
	if lost := doc.Tokens.LostRecord; lost != nil {
		c.Rules.WithholdLost = *lost == withholdLost
		if *lost != withholdLost && *lost != serveLost {
			faults = append(faults, located(where.value("tokens.lost_record"),
				fmt.Errorf("tokens.lost_record is %q: it must be %q or %q", *lost, serveLost, withholdLost)))
		}
	}
	if doc.Tokens.Spread != nil {
		c.Rules.Spread = cmp.Or(c.Rules.Spread, noSpread)
	}
	for _, identity := range doc.Identity {
		c.Rules.Identities = append(c.Rules.Identities, grants.Identity{
			Name: identity.Name, Default: identity.Default,
			ClientID: identity.ClientID, ObjectID: identity.ObjectID, ResourceID: identity.ResourceID,
		})
	}
	c.Source.take(doc.Source)
	c.Loopback.take(doc.Loopback)
	faults = append(faults, c.IoTHub.take(doc.IoTHub, where))
	faults = append(faults, c.takeResources(doc, where)...)
	faults = append(faults, c.Callers.take(doc.Callers, doc.Module, where)...)
	for _, grant := range doc.Grant {
		place := where.table("grant", len(c.Rules.Grants))
		match, err := grant.Caller.match()
		faults = append(faults, located(place, err))
		c.Rules.Grants = append(c.Rules.Grants, grants.Grant{
			Caller: match, Identity: grant.Identity, Resources: grant.Resources, Prefetch: grant.Prefetch, Place: place,
		})
	}
	return errors.Join(faults...)
}

// What becomes of tokens from before when the record of policy changes is lost.
const (
	serveLost    = "serve" // as uncertain
	withholdLost = "withhold"
)

// takeResources adds the alternates that a document names. where has all documents so far, this one
// included.
func (c *Config) takeResources(doc document, where *positions) (faults []error) {
	first := len(where.tables["resource"]) - len(doc.Resource)
	for i, resource := range doc.Resource {
		err := grants.CheckAlternates(resource.URI, resource.Alternates)
		if err == nil && c.Rules.Alternates[resource.URI] != nil {
			err = fmt.Errorf("resource %s is there twice", resource.URI)
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", where.table("resource", first+i), err))
			continue
		}
		if c.Rules.Alternates == nil {
			c.Rules.Alternates = make(map[string][]string)
		}
		c.Rules.Alternates[resource.URI] = resource.Alternates
	}
	return faults
}
