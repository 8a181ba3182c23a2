package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"perceptd/agent/api"
	"perceptd/agent/lock"
	"perceptd/cmd/perceptctl/term"
)

// grantAddition is what is to be granted, or the denial that says it.
type grantAddition struct {
	caller      callerQuery
	identity    string
	resources   []string
	fromDenial  int
	yes         bool
	config      string
	denialGiven bool
}

func (a *app) grantsAddCommand() *cobra.Command {
	var g grantAddition
	command := &cobra.Command{
		Use:   "add --identity NAME --resource URI | --from-denial ID",
		Short: "add a grant to the configuration and put it in force",
		Long: `Add a grant to config.d/50-grants.toml beside the configuration's main file, and
have perceptd read it. What is to be written is shown first, and has to be
confirmed, with --yes on the command line. When perceptd refuses the configuration,
the file is as it was before. Grants for one caller add up, but a grant for a
service, module or image is more specific than one for a user or group, and then
decides alone over that caller.

--from-denial takes the grant that perceptd suggests for one of its latest denials:
perceptctl doctor shows their IDs.

It changes files of root: use sudo.`,
		Example: `  sudo perceptctl grants add --unit cam.service --identity device --resource https://vault.azure.net
  sudo perceptctl grants add --from-denial 3`,
		Args: cobra.NoArgs,
	}
	command.RunE = a.verb(func(ctx context.Context) error {
		g.denialGiven = command.Flags().Changed("from-denial")
		return a.addGrants(ctx, &g)
	})
	flags := command.Flags()
	flags.StringVar(&g.caller.caller.Module, "module", "", "`name` of the module that the grant is for")
	flags.StringVar(&g.caller.caller.Unit, "unit", "", "systemd `service` that the grant is for")
	flags.StringVar(&g.caller.caller.Image, "container-image", "", "image `ID` or digest that the grant is for")
	flags.StringVar(&g.caller.user, "user", "", "`name` or uid of the user that the grant is for")
	flags.StringArrayVar(&g.caller.groups, "group", nil, "`name` or gid of the group that the grant is for")
	flags.StringVar(&g.identity, "identity", "", "`name` of the identity")
	flags.StringArrayVar(&g.resources, "resource", nil, "App ID `URI`; may be given more than once")
	flags.IntVar(&g.fromDenial, "from-denial", 0, "`ID` of the denial that the grant is to mend")
	flags.BoolVar(&g.yes, "yes", false, "do not ask for a confirmation")
	flags.StringVar(&g.config, "config", "/etc/percept/config.toml", "the configuration's main `file`")
	command.MarkFlagsMutuallyExclusive("module", "unit", "container-image", "user", "group", "from-denial")
	command.MarkFlagsOneRequired("module", "unit", "container-image", "user", "group", "from-denial")
	command.MarkFlagsMutuallyExclusive("identity", "from-denial")
	command.MarkFlagsMutuallyExclusive("resource", "from-denial")
	command.MarkFlagsMutuallyExclusive("yes", "from-denial") // perceptd says what is written: a person looks at it
	a.completeFrom(command, "identity", identityNames)
	a.completeFrom(command, "resource", deniedResources)
	a.completeFrom(command, "from-denial", denialIDs)
	a.completeFromGrants(command, "module", "module ")
	a.completeFromGrants(command, "unit", "unit ")
	return command
}

func (a *app) addGrants(ctx context.Context, g *grantAddition) error {
	var wanted []api.NewGrant
	var err error
	if g.denialGiven {
		wanted, err = a.suggestedGrants(ctx, g.fromDenial)
	} else {
		wanted, err = a.namedGrants(ctx, g)
	}
	if err != nil || len(wanted) == 0 {
		return err
	}
	if err := a.checkReads(ctx, g.config); err != nil {
		return err
	}
	file := grantsFile{path: filepath.Join(filepath.Dir(g.config), "config.d", "50-grants.toml")}
	text := ""
	for _, grant := range wanted {
		text += "\n" + grant.TOML()
	}
	if err := a.print("to " + file.path + ", as the last lines:\n" + linesOf(text, "") + "\n"); err != nil {
		return err
	}
	if err := file.open(); err != nil {
		return needsSudo(err)
	}
	defer file.close()
	if bytes.Contains(file.before, []byte(text)) {
		return &hintedError{fmt.Errorf("%s has these lines already", file.path),
			"they are not in force: sudo perceptctl reload"}
	}
	if !g.yes {
		if err := a.confirm(ctx, "write that and have perceptd read it? [y/N] "); err != nil {
			return err
		}
	}
	if err := file.write(text); err != nil {
		return needsSudo(err)
	}
	return a.putInForce(ctx, &file)
}

// putInForce has perceptd read the file. When that refuses the configuration, or does not answer, the file becomes what
// it was.
func (a *app) putInForce(ctx context.Context, file *grantsFile) error {
	asked, cancel := a.withTimeout(ctx)
	defer cancel()
	answer, err := a.client.Reload(asked)
	if err != nil {
		undone := file.undo()
		if undone != nil {
			return errors.Join(err, fmt.Errorf("and %s could not be made what it was: %w", file.path, undone))
		}
		return &hintedError{fmt.Errorf("%w; %s is as it was before", err, file.path), a.hint(err)}
	}
	return a.print(a.screen(a.stdout).reloaded(answer))
}

// checkReads refuses a folder of which perceptd reads nothing: a grant in it would never be in force.
func (a *app) checkReads(ctx context.Context, config string) error {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	status, err := a.client.Status(ctx)
	if err != nil {
		return err
	}
	folder, err := os.Stat(filepath.Dir(config))
	if err != nil {
		return needsSudo(err)
	}
	for _, file := range status.Config.Files {
		if !filepath.IsAbs(file) {
			return nil // it was started by hand, and where is not known
		}
		for _, one := range []string{filepath.Dir(file), filepath.Dir(filepath.Dir(file))} {
			if info, err := os.Stat(one); err == nil && os.SameFile(info, folder) {
				return nil
			}
		}
	}
	if len(status.Config.Files) == 0 {
		return nil
	}
	return &hintedError{fmt.Errorf("perceptd reads nothing in %s, but %s: nothing was written", filepath.Dir(config),
		cleanList(status.Config.Files)), "name its main file with --config"}
}

// namedGrants returns the grant of the command line, without the resources that the caller has already.
func (a *app) namedGrants(ctx context.Context, g *grantAddition) ([]api.NewGrant, error) {
	if g.identity == "" || len(g.resources) == 0 {
		return nil, &usageError{errors.New("--identity and --resource say what is granted")}
	}
	if len(g.caller.groups) > 1 {
		return nil, &usageError{errors.New("--group is given more than once: a grant is for one")}
	}
	named := grantCaller(&g.caller)
	if err := g.caller.resolve(); err != nil {
		return nil, &usageError{err}
	}
	grant := api.NewGrant{Caller: named, Identity: g.identity}
	s := a.screen(a.stdout)
	repeats := false      // what grants of a broader kind allow now
	var repeated []string // of that, what the command line names
	for _, resource := range g.resources {
		resource = api.FullResource(resource)
		asked, cancel := a.withTimeout(ctx)
		d, err := a.client.CheckGrants(asked, g.caller.caller, resource, g.identity)
		cancel()
		switch {
		case err != nil:
			return nil, err
		case d.Allowed:
			if err := a.print(s.Paragraph("", "granted already: "+d.Reason, term.Plain)); err != nil {
				return nil, err
			}
			if g.caller.user != "" && d.Grant != nil && isOfGroup(*d.Grant) {
				repeated = append(repeated, resource)
			}
			continue
		case d.Code != api.CodeNotGranted:
			return nil, deniedError(d.Code, d.Reason)
		case d.Suggestion == nil && d.NearMiss != nil:
			return nil, deniedError(d.Code, d.Reason)
		case d.Suggestion != nil && !slices.Contains(d.Suggestion.Resources(), resource):
			return nil, fmt.Errorf("%s is not Azure's own spelling of that resource: name %s", resource,
				cleanList(d.Suggestion.Resources()))
		}
		repeats = repeats || d.Suggestion != nil && d.Suggestion.Repeats
		grant.Resources = append(grant.Resources, resource)
	}
	if len(grant.Resources) == 0 {
		return nil, nil
	}
	grant.Resources = append(grant.Resources, repeated...)
	if repeats {
		note := "a grant of a broader kind is for this caller now, and counts no more beside this one: name with " +
			"--resource what it is to keep, as perceptctl grants check shows it"
		if err := a.print(s.Paragraph("note: ", note, term.Warning)); err != nil {
			return nil, err
		}
	}
	return []api.NewGrant{grant}, nil
}

// isOfGroup reports whether a grant is for a group: beside one for a user it does not count for that user.
func isOfGroup(g api.Grant) bool {
	return strings.HasPrefix(g.Caller, "group ") || strings.HasPrefix(g.Caller, "gid ")
}

// grantCaller returns whom the command line names, as the configuration names it.
func grantCaller(c *callerQuery) api.GrantCaller {
	named := api.GrantCaller{Module: c.caller.Module, Unit: c.caller.Unit, Image: c.caller.Image}
	if c.user != "" {
		if id, err := idOf(c.user, noName); err == nil {
			named.UID = &id
		} else {
			named.User = c.user
		}
	}
	for _, group := range c.groups {
		if id, err := idOf(group, noName); err == nil {
			named.GID = &id
		} else {
			named.Group = group
		}
	}
	return named
}

// noName is for idOf where only a number is one.
func noName(name string) (string, error) { return "", fmt.Errorf("%q is a name", name) }

// suggestedGrants returns what perceptd suggests to write for one of its latest denials.
func (a *app) suggestedGrants(ctx context.Context, id int) ([]api.NewGrant, error) {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	status, err := a.client.Status(ctx)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(status.Denials, func(d api.Denial) bool { return d.ID == id && d.Resource != "" })
	if i < 0 {
		return nil, &hintedError{fmt.Errorf("no denial of late has the ID %d", id),
			"perceptctl doctor shows those there are"}
	}
	d := status.Denials[i]
	if err := a.print(a.screen(a.stdout).Paragraph("denied  ", fmt.Sprintf("%s for %s, %s: %s", d.Caller, d.Resource,
		plural(d.Count, "time", "times"), d.Reason), term.Plain)); err != nil {
		return nil, err
	}
	switch {
	case d.GrantedNow:
		return nil, a.print("granted since: nothing to add\n")
	case d.Suggestion == nil:
		return nil, errors.New("no grant would help: the reason says what does")
	}
	for _, grant := range d.Suggestion.Grants {
		if grant.Identity == "" {
			return nil, &hintedError{errors.New("which identity is meant cannot be told"),
				"name one of " + cleanList(identityNames(status)) + ": " + term.Clean(d.Suggestion.Command)}
		}
	}
	return d.Suggestion.Grants, nil
}

// confirm asks a person, and goes on at a yes.
func (a *app) confirm(ctx context.Context, question string) error {
	if _, err := io.WriteString(a.stderr, question); err != nil {
		return err
	}
	said := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(a.stdin).ReadString('\n') // nothing to read is a no
		said <- line
	}()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case line := <-said:
		switch strings.ToLower(strings.TrimSpace(line)) {
		case "y", "yes":
			return nil
		}
	}
	return &hintedError{errors.New("not confirmed: nothing was written"), "--yes confirms it on the command line"}
}

// needsSudo adds to an error what lets root's files be written.
func needsSudo(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return &hintedError{fmt.Errorf("%w: nothing was written", err), "the configuration is root's: run it with sudo"}
	}
	return err
}

// deniedResources are those of the latest denials.
func deniedResources(status api.Status) []string {
	var all []string
	for _, d := range status.Denials {
		if d.Resource != "" && !slices.Contains(all, d.Resource) {
			all = append(all, d.Resource)
		}
	}
	return all
}

// denialIDs are those of the latest denials that a grant would mend.
func denialIDs(status api.Status) []string {
	var all []string
	for _, d := range status.Denials {
		if d.Suggestion != nil {
			all = append(all, fmt.Sprint(d.ID))
		}
	}
	return all
}

// grantsFile is the file that grants are added to. Others may add to it as well: one at a time.
type grantsFile struct {
	path    string
	before  []byte // nil: there was none
	written []byte
	lock    *lock.Folder // on the folder
	made    bool         // the folder was not there
}

const grantsFileHead = "# Written by perceptctl grants add. perceptctl reload puts in force what is changed by hand.\n"

// open locks the folder, which it makes where there is none, and reads the file.
func (f *grantsFile) open() error {
	folder := filepath.Dir(f.path)
	err := os.Mkdir(folder, 0o755)
	switch {
	case err == nil:
		f.made, err = true, os.Chmod(folder, 0o755) // the daemon's user has to look into it, whatever the umask
		if err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrExist):
		return err
	}
	there, err := os.Open(folder)
	if err != nil {
		return err
	}
	if f.lock, err = lock.TakeFile(there); err != nil {
		if _, held := errors.AsType[lock.HeldError](err); held {
			err = fmt.Errorf("%s is in use by another perceptctl: %w", folder, unix.EWOULDBLOCK)
		}
		return err
	}
	if err := unix.Access(folder, unix.W_OK); err != nil {
		return errors.Join(&fs.PathError{Op: "write to", Path: folder, Err: err}, f.lock.Close())
	}
	if f.before, err = f.read(); err != nil {
		return errors.Join(err, f.lock.Close())
	}
	return nil
}

// read returns what is in the file; nil: there is none.
func (f *grantsFile) read() ([]byte, error) {
	info, err := os.Lstat(f.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a file of its own: add the grant by hand", f.path)
	}
	return os.ReadFile(f.path)
}

// checkIs refuses a file that an editor, which the lock does not keep off, has written since.
func (f *grantsFile) checkIs(content []byte) error {
	now, err := f.read()
	if err == nil && (!bytes.Equal(now, content) || (now == nil) != (content == nil)) {
		err = fmt.Errorf("%s was changed meanwhile", f.path)
	}
	return err
}

// write adds text to the file, whole or not at all, and not to another than was read.
func (f *grantsFile) write(text string) error {
	if err := f.checkIs(f.before); err != nil {
		return &hintedError{fmt.Errorf("%w: nothing was written", err), "look at it, and run the command again"}
	}
	content := bytes.Clone(f.before)
	if f.before == nil {
		content = []byte(grantsFileHead)
	}
	if len(content) > 0 && !bytes.HasSuffix(content, []byte("\n")) {
		content = append(content, '\n')
	}
	if f.before != nil {
		if err := os.Remove(f.aside()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.Link(f.path, f.aside()); err != nil {
			return err
		}
	}
	f.written = append(content, text...)
	return f.replace(f.written)
}

// aside is where the file that was there before stays until the other is in force. No file of that name is read.
func (f *grantsFile) aside() string { return f.path + ".before" }

// undo puts the file that was there before in its place again, and leaves one that was changed since.
func (f *grantsFile) undo() error {
	err := f.checkIs(f.written)
	if err != nil {
		return err
	}
	if f.before != nil {
		err = os.Rename(f.aside(), f.path)
	} else {
		err = os.Remove(f.path)
	}
	return errors.Join(err, syncFolder(filepath.Dir(f.path)))
}

// replace puts content in the file's place in one step. The name that it has until then is none that perceptd reads.
func (f *grantsFile) replace(content []byte) error {
	part := f.path + ".new"
	if err := os.Remove(part); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	to, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = to.Write(content)
	// The mode does not go by the umask: the daemon's user has to read it.
	if err = errors.Join(err, to.Chmod(0o644), to.Sync(), to.Close()); err == nil {
		err = os.Rename(part, f.path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(part))
	}
	return syncFolder(filepath.Dir(f.path))
}

// close lets others add grants. A folder that was made for nothing goes.
func (f *grantsFile) close() {
	_ = os.Remove(f.aside())
	if f.made {
		_ = os.Remove(filepath.Dir(f.path)) // it stays where it has the file
	}
	_ = f.lock.Close()
}
