package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"perceptd/agent/binding"
	"perceptd/agent/store"
	"perceptd/cmd/perceptctl/term"
)

const (
	cacheKeySize = 32
	cacheKeyUnit = "perceptd-cache-key.service"
	cacheKeyNext = "systemctl restart perceptd-cache-key perceptd"
)

// What seals the cache's key.
const (
	withAuto    = "auto" // what is best here
	withTPM2    = "tpm2"
	withHost    = "host"
	withBoth    = "host+tpm2"
	withFile    = "file" // nothing: it is a file in the clear
	withUnknown = "unknown"
)

// credentialSeals are the first bytes of a systemd credential: what it is sealed with.
var credentialSeals = map[string]string{
	"5a1c6a86df9d4096b1d5a65e0862f19a": withHost,
	"0c7cc07b117645919c4b0bea08bc20fe": withTPM2,
	"faf7eb9341e3412ca1a436f95a29362f": withTPM2, // and a signed PCR policy
	"93a894094874449090caf2fc93cab553": withBoth,
	"af4950a849134eb1a73846304ff30c05": withBoth, // and a signed PCR policy
}

// What tokens on the disk are worth to others, by what seals their key.
const (
	tpmWorth = "the disk alone does not open the tokens on it: that takes this device's TPM, and Secure Boot in the " +
		"state it was in (PCR 7), where the firmware measures that. Whoever has the whole device, or is root on it, " +
		"can open them"
	hostWorth = "whoever has the whole disk can open the tokens on it, since the host's key " +
		"(/var/lib/systemd/credential.secret) is on a disk too. A copy of /etc or of perceptd's state alone opens " +
		"nothing"
	fileWorth = "whoever has the disk can open the tokens on it. A copy of perceptd's state alone opens nothing"
)

// seals names what seals a key, and says what that is worth.
var seals = map[string]struct{ name, worth string }{
	withTPM2: {"sealed by the TPM", tpmWorth},
	withBoth: {"sealed by the TPM and this host's key", tpmWorth},
	withHost: {"sealed by this host's key", hostWorth},
	withFile: {"a file in the clear", fileWorth},
	withUnknown: {"sealed by something that this perceptctl does not know",
		"systemd-creds decrypt tells what opens it"},
}

func (a *app) cacheKeyCommand() *cobra.Command {
	var key cacheKey
	command := &cobra.Command{
		Use:   "cache-key",
		Short: "make the key that kept tokens are sealed with, and say what it is worth",
		Long: `perceptd keeps its tokens over a reboot in a file that is sealed with a key.
Where systemd has credentials (250 and later) that key is sealed in turn, by the
TPM or by a key of the host; elsewhere it is a file that root and perceptd can
read. Without a key tokens are kept over a restart, and not over a reboot.

By itself it shows the key's kind, as show does.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error { return a.showCacheKey(ctx, key) }),
	}
	command.PersistentFlags().StringVar(&key.file, "file", "/etc/percept/cache-key",
		"`path` of the key in the clear, as perceptd's --cache-key; sealed it is at this path with .cred")
	command.AddCommand(a.cacheKeyMakeCommand(&key), a.cacheKeyShowCommand(&key), a.cacheKeyOpenCommand(&key))
	return command
}

// keyOptions is how a key is to be made.
type keyOptions struct {
	with, group     string
	replace, dryRun bool
}

func (a *app) cacheKeyMakeCommand(key *cacheKey) *cobra.Command {
	var m keyOptions
	command := &cobra.Command{
		Use:   "make",
		Short: "make the key, as root",
		Long: `Make a random key and keep it, sealed by systemd-creds if that is here. It tells
what such a key is worth, and the next step. A key that is there stays, and that
is no error unless --with names another kind, or it was never filled. --replace makes another key: tokens
that the one before has sealed are then lost, and fetched anew.

--with tells what seals the key:
  auto   the TPM and the host's key, or what there is of them; else nothing
  tpm2   the TPM
  host   the host's key, /var/lib/systemd/credential.secret
  file   nothing: the key is a file in the clear, for root and the group of perceptd`,
		Example: `  sudo perceptctl cache-key make
  sudo perceptctl cache-key make --with tpm2 --replace`,
		Args: cobra.NoArgs,
		PreRunE: func(*cobra.Command, []string) error {
			if !slices.Contains([]string{withAuto, withTPM2, withHost, withFile}, m.with) {
				return fmt.Errorf("--with %q is none of auto, tpm2, host, file", m.with)
			}
			return nil
		},
		RunE: a.verb(func(ctx context.Context) error { return a.makeCacheKey(ctx, *key, m) }),
	}
	flags := command.Flags()
	flags.StringVar(&m.with, "with", withAuto, "what seals the key: auto, tpm2, host or file")
	flags.StringVar(&m.group, "group", "percept", "`group` that may read a key in the clear")
	flags.BoolVar(&m.replace, "replace", false, "make another key in place of the one that is there")
	flags.BoolVar(&m.dryRun, "dry-run", false, "say what would be done, and do nothing")
	return command
}

func (a *app) makeCacheKey(ctx context.Context, key cacheKey, m keyOptions) error {
	if !m.replace {
		with, path, err := key.present()
		if err != nil {
			return needsRoot(err)
		}
		if path != "" {
			return a.keepCacheKey(with, path, m)
		}
	}
	if m.with == withAuto && a.findProgram("systemd-creds") == "" {
		m.with = withFile
	}
	path, other := key.credential(), key.file
	if m.with == withFile {
		path, other = other, path
	}
	if m.dryRun {
		return a.print(a.screen(a.stdout).Paragraph("", m.plan(path), term.Plain))
	}
	with, err := a.writeCacheKey(ctx, path, m)
	if err != nil {
		return err
	}
	if err := os.Remove(other); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the key from before cannot be removed, remove it by hand: %w", err)
	}
	s := a.screen(a.stdout)
	return a.print(s.cacheKey(with, path) + s.Paragraph("next      ", cacheKeyNext, term.Plain))
}

// present returns the path of the key that is there and what seals it; the path is empty where there is none.
func (k cacheKey) present() (with, path string, err error) {
	for _, path := range []string{k.credential(), k.file} {
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return "", "", err
		}
		with, err := readSeal(k)
		if err != nil { // also a link that leads nowhere yet: its disk may come later
			return "", "", fmt.Errorf("there is a key already, %s, that cannot be read: %w", path, err)
		}
		return with, path, nil
	}
	return "", "", nil
}

// keepCacheKey leaves the key that is there, so that an upgrade may take the steps of an installation, and refuses
// where another kind was asked for.
func (a *app) keepCacheKey(with, path string, m keyOptions) error {
	if m.with != withAuto && m.with != with {
		return &hintedError{fmt.Errorf("there is a key already, %s, %s", path, seals[with].name),
			"--replace makes another; tokens that were sealed with this one are fetched anew"}
	}
	if with == withFile {
		if err := checkKey(path); err != nil {
			return needsRoot(err)
		}
	}
	s := a.screen(a.stdout)
	return a.print(s.cacheKey(with, path) + s.Paragraph("made      ", "nothing: there is a key already, and it stays",
		term.Good))
}

// checkKey reports whether a key in the clear is one.
func checkKey(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	defer clear(text)
	if _, err := store.KeyOf(text); err != nil {
		return &hintedError{fmt.Errorf("the key that is there, %s, is none: %w", path, err),
			"perceptctl cache-key make --replace makes another"}
	}
	return nil
}

func (m keyOptions) plan(path string) string {
	if m.with == withFile {
		return fmt.Sprintf("would write a random key to %s in the clear, to be read by root and the group %s",
			path, m.group)
	}
	return fmt.Sprintf("would seal a random key with systemd-creds encrypt --with-key=%s, and write it to %s",
		m.with, path)
}

// writeCacheKey makes a key, writes it to path, and returns what it is sealed with.
func (a *app) writeCacheKey(ctx context.Context, path string, m keyOptions) (with string, err error) {
	secret := make([]byte, cacheKeySize)
	_, _ = rand.Read(secret) // never fails
	if m.with == withFile {
		gid, err := groupID(m.group)
		if err != nil {
			return "", err
		}
		return withFile, needsRoot(writeAtomically(path, secret, 0o640, gid))
	}
	sealed, err := a.seal(ctx, secret, m.with)
	if err != nil {
		return "", &hintedError{fmt.Errorf("the key cannot be sealed: %w", err), unsealableHint(err)}
	}
	return sealOf(sealed), needsRoot(writeAtomically(path, sealed, 0o600, -1))
}

// unsealableHint says what to do where no key can be sealed.
func unsealableHint(err error) string {
	const other = "--with host or --with file needs none"
	failed, known := errors.AsType[*programError](err)
	if known {
		fault, passes := sealFaultIn(failed.stderr)
		if passes && !fault.final && fault != notHere && fault != noLibrary {
			return fault.why + ": wait, and make it again; " + other
		}
	}
	return "it takes root, and for tpm2 a TPM: systemd-creds has-tpm2 tells; " + other
}

func groupID(name string) (int, error) {
	group, err := user.LookupGroup(name)
	if err != nil {
		return 0, &hintedError{fmt.Errorf("perceptd's group: %w", err),
			"systemd-sysusers makes it; --group names another"}
	}
	return strconv.Atoi(group.Gid)
}

func (a *app) cacheKeyShowCommand(key *cacheKey) *cobra.Command {
	return &cobra.Command{
		Use:   "show",
		Short: "say which kind of key there is and what it is worth, as root",
		Long: `Say which kind of key there is, what it protects kept tokens against, what of this
device they are bound to, and whether perceptd can have the key. The key itself is
never shown. The exit status is 5 when there is none, when it cannot be used or
opened, or when root is to tell perceptd more of the device, as after an upgrade.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error { return a.showCacheKey(ctx, *key) }),
	}
}

func (a *app) showCacheKey(ctx context.Context, key cacheKey) error {
	s := a.screen(a.stdout)
	with, err := readSeal(key)
	if errors.Is(err, fs.ErrNotExist) {
		text := s.Paragraph("key       ", "none: tokens are kept over a restart, and not over a reboot", term.Warning) +
			s.Paragraph("next      ", "perceptctl cache-key make", term.Plain)
		return a.printTrouble(text)
	}
	if err != nil {
		return needsRoot(err)
	}
	if with == withFile {
		err = checkKey(key.file)
		if none, known := errors.AsType[*hintedError](err); known {
			return a.printTrouble(s.Paragraph("key       ", none.Error()+
				": tokens are kept over a restart, and not over a reboot", term.Bad) +
				s.Paragraph("next      ", none.hint, term.Plain))
		}
		if err != nil {
			return needsRoot(err)
		}
	}
	bound, next := a.bindingText(ctx, s)
	if with == withFile {
		text := s.cacheKey(with, key.file) + bound
		if next != "" {
			return a.printTrouble(text + s.Paragraph("next      ", next, term.Plain))
		}
		return a.print(text)
	}
	text := s.cacheKey(with, key.credential()) + bound
	opened, mend := a.openedText(ctx, s)
	text += opened
	if mend == "" && next == "" {
		return a.print(text)
	}
	text += s.Paragraph("next      ", cmp.Or(mend, next), term.Plain)
	return a.printTrouble(text)
}

// openedText says whether the sealed key is open for perceptd, as the unit that opens it says; next is what to do where
// it is not.
func (a *app) openedText(ctx context.Context, s screen) (text, next string) {
	unit := a.unit(ctx, cacheKeyUnit)
	why, next, said := strings.Cut(unit.text, statusNext)
	switch {
	case unit.active == "active" && unit.sub == "running" && said:
		return s.Paragraph("opened    ", "not yet: "+why, term.Warning), next
	case unit.active == "active":
		return s.Paragraph("opened    ", "yes, since "+cacheKeyUnit+" started", term.Good), ""
	case unit.active == "failed" && said:
		return s.Paragraph("opened    ", "no: "+why+"; perceptd serves without it", term.Bad), next
	case unit.active == "failed":
		return s.Paragraph("opened    ", "no: systemctl status "+cacheKeyUnit+
			" tells why, and perceptd serves without it", term.Bad), cacheKeyNext
	}
	return s.Paragraph("opened    ", "not yet", term.Warning), cacheKeyNext
}

// cacheKey says what a key is worth.
func (s screen) cacheKey(with, path string) string {
	about := seals[with]
	return s.Paragraph("key       ", path+", "+about.name, term.Plain) +
		s.Paragraph("worth     ", about.worth, term.Plain)
}

// bindingText says what kept tokens are bound to, and what to do where they could be bound to something better; next is
// empty where they could not. It asks perceptd, which may not know what root can read here: after an upgrade in place,
// the perceptd-cache-key.service that the version before started is active, and has passed nothing on to it.
func (a *app) bindingText(ctx context.Context, s screen) (text, next string) {
	asked, cancel := context.WithTimeout(ctx, a.probeTimeout())
	defer cancel()
	status, err := a.fetchStatus(asked)
	kept := status.Kept
	if err != nil || !kept.Reboot { // it keeps none yet: what it finds when it starts
		known, err := binding.Known(binding.DeviceFile, "/")
		if err != nil {
			return s.Paragraph("bound     ", "what of this device they are bound to cannot be read", term.Warning),
				cacheKeyNext
		}
		return s.binding(binding.Best(known)), ""
	}
	if kept.BoundTo == "" {
		return s.Paragraph("bound     ", "to nothing: the perceptd that runs is of a version that binds them to no "+
			"device", term.Warning), cacheKeyNext
	}
	kind := binding.KindOf(kept.BoundTo)
	if kept.Untold && !kind.Hardware() {
		next = cacheKeyNext
	}
	return s.binding(kind), next
}

func (s screen) binding(kind binding.Kind) string {
	if kind.Hardware() {
		return s.Paragraph("bound     ", bindingWorth(kind), term.Plain)
	}
	return s.Paragraph("bound     ", bindingWorth(kind), term.Warning)
}

// bindingWorth says what kept tokens are bound to, and what that is worth.
func bindingWorth(kind binding.Kind) string {
	switch {
	case kind.Hardware():
		return "to this device, by its " + kind.Name() +
			": on another one that has its state and its key they do not open"
	case kind == binding.MachineID:
		return "to this installation, by its machine-id: a copy of the whole disk opens them on another device"
	}
	return "to nothing, since this device is known by nothing of its own: a copy of state and key opens them on " +
		"another device"
}

// readSeal returns what the key is sealed with. A credential counts before a key in the clear.
func readSeal(key cacheKey) (string, error) {
	sealed, err := os.ReadFile(key.credential())
	if errors.Is(err, fs.ErrNotExist) {
		_, err = os.Stat(key.file)
		return withFile, err
	}
	if err != nil {
		return "", err
	}
	return sealOf(sealed), nil
}

// sealOf returns what a credential is sealed with.
func sealOf(sealed []byte) string {
	// What is no base64 has no such beginning.
	raw, _ := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(string(sealed)), ""))
	for beginning, with := range credentialSeals {
		if strings.HasPrefix(hex.EncodeToString(raw), beginning) {
			return with
		}
	}
	return withUnknown
}
