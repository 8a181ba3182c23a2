package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"perceptd/agent"
	"perceptd/agent/simulator"
	"perceptd/agent/source"
)

// Kinds of source.
const (
	managedIdentity = "managed-identity"
	simulated       = "simulated"
)

// maxConfig bounds one configuration file, in bytes.
const maxConfig = 1 << 20

// config is a configuration that was checked.
type config struct {
	files  []string // in the order they were read
	source sourceConfig
	rules  agent.Rules

	callers  callersConfig
	loopback loopbackConfig

	warnings []string // of what is in force all the same
}

// sourceConfig says where tokens come from.
type sourceConfig struct {
	kind     string
	endpoint source.Endpoint
	speed    float64 // simulated: how much faster time runs
	rollover string  // simulated: when the back end hands out a newer token

	spread time.Duration // simulated: how long a change of permissions takes to reach new tokens
}

// defaultSource is what counts where no file says otherwise.
var defaultSource = sourceConfig{kind: managedIdentity, endpoint: source.Auto, speed: 1, rollover: simulator.AtExpiry.String()}

// document is one configuration file as it is written. Pointers tell a missing key from a zero.
type document struct {
	Source struct {
		Kind     *string  `toml:"kind"`
		Endpoint *string  `toml:"endpoint"`
		Speed    *float64 `toml:"speed"`
		Rollover *string  `toml:"rollover"`
		Spread   any      `toml:"spread"` // for setDuration
	} `toml:"source"`
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
}

// setDuration sets *to to the value of a key, unless the key is not there. A duration is a string in TOML,
// whose numbers have no unit.
func setDuration(to *time.Duration, value any, key string, where *places) error {
	if value == nil {
		return nil
	}
	text, isText := value.(string)
	parsed, err := time.ParseDuration(text)
	if err == nil {
		*to = parsed
		return nil
	}
	if isText {
		value = strconv.Quote(text)
	}
	return fmt.Errorf(`%s: %s is %v: write a duration in quotes, such as "50m" or "1h30m"`, where.value(key), key, value)
}

// loadConfig reads path and its neighbour config.d/*.toml in the order of their names. Lists add up;
// of a single value that several files set, the last one counts. The error names every fault by file
// and line.
func loadConfig(path string) (config, error) { return loadTrusted(path, ownFiles(), memberOf) }

// checkConfig is loadConfig for whom the daemon runs as, who is named: where root asks and the service has a user, that user,
// who may be able to read less than root, and is in other groups. Empty: this process's user.
func checkConfig(path string) (c config, judgedFor string, err error) {
	service := serviceReader()
	if os.Geteuid() != 0 || service == nil {
		c, err = loadConfig(path)
		return c, "", err
	}
	c, err = loadTrusted(path, &trust{reader: service}, otherMemberOf)
	return c, service.name, err
}

// loadTrusted is loadConfig with what files are trusted, and who is in a group.
func loadTrusted(path string, by *trust, in func(gid uint32, grants []agent.Grant) string) (config, error) {
	extra, err := extraFiles(filepath.Join(filepath.Dir(path), "config.d"), by)
	if err != nil {
		return config{}, err
	}
	c := config{source: defaultSource, callers: defaultCallers}
	where := newPlaces()
	var unread, faults []error
	for _, file := range append([]string{path}, extra...) {
		text, err := readConfig(file, by)
		if err != nil {
			unread = append(unread, err)
			continue
		}
		var doc document
		if err := decodeConfig(file, text, &doc); err != nil {
			unread = append(unread, err)
			continue
		}
		if where.add(file, text) != (tableCounts{len(doc.Identity), len(doc.Grant), len(doc.Resource), len(doc.Module)}) {
			unread = append(unread, fmt.Errorf("%s: write [[identity]], [[grant]], [[resource]] and [[module]], each with two brackets: there may be several", file))
			continue
		}
		c.files = append(c.files, file)
		faults = append(faults, c.take(doc, where))
	}
	if err := errors.Join(unread...); err != nil {
		return config{}, err // what stands in those files would be missing in the rest
	}
	if key, err := c.source.validate(); err != nil {
		faults = append(faults, fmt.Errorf("%s: %w", where.value(key), err))
	}
	if key, err := c.callers.validate(); err != nil {
		faults = append(faults, fmt.Errorf("%s: %w", where.value(key), err))
	}
	_, hasLoopback := where.values["loopback"]
	if key, err := c.loopback.validate(hasLoopback); err != nil {
		faults = append(faults, fmt.Errorf("%s: %w", where.value(key), err))
	}
	faults = append(faults, where.locate(c.rules.Validate()))
	faults = append(faults, c.unprovable(where)...)
	warnings, open := by.settle(c.rules.Grants, in)
	c.warnings = warnings
	faults = append(faults, open...)
	if err := errors.Join(faults...); err != nil {
		return config{}, err
	}
	return c, nil
}

// extraFiles lists the .toml files of a folder, which need not be there, in the order of their names.
func extraFiles(dir string, by *trust) ([]string, error) {
	entries, err := by.list(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, dangling(dir)
	}
	if err != nil {
		return nil, err
	}
	var files []string
	for _, entry := range entries {
		if strings.HasSuffix(entry.Name(), ".toml") {
			files = append(files, filepath.Join(dir, entry.Name()))
		}
	}
	return files, nil
}

// readConfig reads a file that only those who are trusted can have written.
func readConfig(path string, by *trust) ([]byte, error) {
	f, err := by.open(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := dangling(path); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%s: not there: write one, README.md shows a first one", path)
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("%s: not a regular file", path), err)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxConfig {
		return nil, fmt.Errorf("%s: larger than %d bytes", path, maxConfig)
	}
	return text, nil
}

// dangling says that what is at path, which leads nowhere, is a link; nil: it is not one.
func dangling(path string) error {
	target, err := os.Readlink(path)
	if err != nil {
		return nil
	}
	return fmt.Errorf("%s: a link to nothing, since %s is not there: put it there, or remove the link", path, target)
}

// decodeConfig is strict: a key that nobody reads is an error, since it may be a misspelt grant.
func decodeConfig(file string, text []byte, doc *document) error {
	err := toml.NewDecoder(strings.NewReader(string(text))).DisallowUnknownFields().Decode(doc)
	var unknown *toml.StrictMissingError
	var syntax *toml.DecodeError
	switch {
	case errors.As(err, &unknown):
		var faults []error
		for i := range unknown.Errors {
			line, _ := unknown.Errors[i].Position()
			faults = append(faults, fmt.Errorf("%s:%d: unknown key %s%s", file, line, key(unknown.Errors[i].Key()), hint(unknown.Errors[i].Key())))
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
	if kind, _, wrongType := strings.Cut(strings.TrimPrefix(text, "cannot decode TOML "), " into struct field "); wrongType {
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
		return ": [[grant]] has caller (by module, unit, container_image, user, uid, group or gid), identity, resources and prefetch"
	case "callers":
		return ": [callers] has engine, cgroup_parents, requests_per_second and young"
	case "loopback":
		return ": [loopback] has address"
	case "module":
		return ": [[module]] has name, require and container"
	}
	return ": the tables are [source], [tokens], [callers], [loopback], [[identity]], [[grant]], [[resource]] and [[module]]"
}

// take adds a document to c.
func (c *config) take(doc document, where *places) error {
	faults := []error{
		setDuration(&c.rules.SDKLife, doc.Tokens.SDKLife, "tokens.sdk_life", where),
		setDuration(&c.rules.Spread, doc.Tokens.Spread, "tokens.spread", where),
		setDuration(&c.source.spread, doc.Source.Spread, "source.spread", where),
	}
	if lost := doc.Tokens.LostRecord; lost != nil {
		c.rules.WithholdLost = *lost == withholdLost
		if *lost != withholdLost && *lost != serveLost {
			faults = append(faults, located(where.value("tokens.lost_record"), fmt.Errorf("tokens.lost_record is %q: it must be %q or %q", *lost, serveLost, withholdLost)))
		}
	}
	if doc.Tokens.Spread != nil {
		c.rules.Spread = cmp.Or(c.rules.Spread, noSpread)
	}
	for _, identity := range doc.Identity {
		c.rules.Identities = append(c.rules.Identities, agent.Identity(identity))
	}
	c.source.take(doc)
	c.loopback.take(doc.Loopback)
	faults = append(faults, c.takeResources(doc, where)...)
	faults = append(faults, c.callers.take(doc.Callers, doc.Module, where)...)
	for _, grant := range doc.Grant {
		place := where.table("grant", len(c.rules.Grants))
		match, err := grant.Caller.match()
		faults = append(faults, located(place, err))
		c.rules.Grants = append(c.rules.Grants, agent.Grant{
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

// noSpread is what the rules take for no spread at all: zero stands for the default there.
const noSpread = time.Nanosecond

// takeResources adds the alternates that a document names. where has all documents so far, this one
// included.
func (c *config) takeResources(doc document, where *places) (faults []error) {
	first := len(where.tables["resource"]) - len(doc.Resource)
	for i, resource := range doc.Resource {
		err := agent.CheckAlternates(resource.URI, resource.Alternates)
		if err == nil && c.rules.Alternates[resource.URI] != nil {
			err = fmt.Errorf("resource %s is there twice", resource.URI)
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", where.table("resource", first+i), err))
			continue
		}
		if c.rules.Alternates == nil {
			c.rules.Alternates = make(map[string][]string)
		}
		c.rules.Alternates[resource.URI] = resource.Alternates
	}
	return faults
}

func uidOf(name string) (uint32, error) {
	account, err := user.Lookup(name)
	if err != nil {
		return 0, fmt.Errorf("user %q is not known on this device: create it, or name a uid", name)
	}
	uid, err := strconv.ParseUint(account.Uid, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("user %q has uid %q, which is no number", name, account.Uid)
	}
	return uint32(uid), nil
}

// take overwrites what a document sets.
func (s *sourceConfig) take(doc document) {
	written := doc.Source
	if written.Kind != nil {
		s.kind = *written.Kind
	}
	if written.Endpoint != nil {
		s.endpoint = source.Endpoint(*written.Endpoint)
	}
	if written.Speed != nil {
		s.speed = *written.Speed
	}
	if written.Rollover != nil {
		s.rollover = *written.Rollover
	}
}

// maxSimulatedSpread is as long as [tokens] spread can allow for.
const maxSimulatedSpread = 24 * time.Hour

// validate looks at what all files together say; key is the one that is wrong.
func (s *sourceConfig) validate() (key string, err error) {
	endpoints := []source.Endpoint{source.Auto, source.Arc, source.AppService, source.IMDS}
	forSimulated := fmt.Errorf("source.speed, source.rollover and source.spread are for source.kind = %q only", simulated)
	_, err = simulator.ParseRollover(s.rollover)
	switch {
	case s.kind != managedIdentity && s.kind != simulated:
		return "source.kind", fmt.Errorf("source.kind is %q: it must be %q or %q", s.kind, managedIdentity, simulated)
	case !slices.Contains(endpoints, s.endpoint):
		return "source.endpoint", fmt.Errorf("source.endpoint is %q: it must be auto, arc, app-service or imds", s.endpoint)
	case s.kind != simulated && s.speed != defaultSource.speed:
		return "source.speed", forSimulated
	case s.kind != simulated && s.rollover != defaultSource.rollover:
		return "source.rollover", forSimulated
	case s.kind != simulated && s.spread != defaultSource.spread:
		return "source.spread", forSimulated
	case s.spread < 0 || s.spread > maxSimulatedSpread:
		return "source.spread", fmt.Errorf("source.spread is %v: it must be between 0s and %v", s.spread, maxSimulatedSpread)
	case !(s.speed >= 1 && s.speed <= 100_000): // NaN is neither
		return "source.speed", fmt.Errorf("source.speed is %v: it must be between 1 and 100000", s.speed)
	case err != nil:
		return "source.rollover", fmt.Errorf("source.rollover: %w", err)
	}
	return "", nil
}
