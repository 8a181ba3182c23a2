package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"perceptd/agent"
	"perceptd/agent/grants"
)

// maxFile bounds one configuration file, in bytes.
const maxFile = 1 << 20

// File is a configuration file and what it says.
type File struct {
	Path string
	Text []byte
}

// Reading is what was found at a configuration's path and in its neighbour config.d. What the files say is Config.
type Reading struct {
	Files []File // read, trusted and TOML, in the order in which they count

	// Faults are of files that are there and cannot be read or parsed, or that are refused since others could have
	// written them. Each names its file, and what mends it.
	Faults []error

	Missing bool     // the main file is not there
	Unread  []string // what is in config.d and is not read, with why

	path     string   // of the main file
	warnings []string // of what is read all the same
}

// Load reads path and its neighbour config.d/*.toml in the order of their names. Lists add up;
// of a single value that several files set, the last one counts. The error names every fault by file
// and line.
func Load(path string) (Config, error) { return loadTrusted(path, ownFiles(), memberOf) }

// loadTrusted is Load with what files are trusted, and who is in a group.
func loadTrusted(path string, by *trust, in func(gid uint32, all []grants.Grant) string) (Config, error) {
	return readTrustedFiles(path, by, in).Whole()
}

// Whole returns what the files of r say where neither they nor an element of them has a fault. Else the error names
// every fault.
func (r Reading) Whole() (Config, error) {
	c := r.Config()
	if err := r.faultWith(c); err != nil {
		return Config{}, err
	}
	return c, nil
}

// Read reads path and its neighbour config.d/*.toml in the order of their names, as far as this process can and the
// files are to be trusted.
func Read(path string) Reading { return readTrustedFiles(path, ownFiles(), memberOf) }

// readTrustedFiles is Read with what files are trusted, and who is in a group.
func readTrustedFiles(path string, by *trust, in func(gid uint32, all []grants.Grant) string) Reading {
	r := Reading{path: path}
	files := []string{path}
	extra, unread, err := extraFiles(filepath.Join(filepath.Dir(path), "config.d"), by)
	if err != nil {
		r.Faults = append(r.Faults, err)
	}
	r.Unread = unread
	values := 0
	for _, file := range append(files, extra...) {
		text, err := readFile(file, by)
		if errors.Is(err, errNotThere) && file == path {
			r.Missing = true
			continue
		}
		if err == nil {
			err = addValues(&values, File{file, text})
		}
		if err != nil {
			r.addFault(err)
			continue
		}
		r.Files = append(r.Files, File{file, text})
	}
	if main := slices.IndexFunc(r.Files, func(file File) bool { return file.Path == path }); main >= 0 &&
		(r.saysNothing() || isBlank(r.Files[main].Text)) {
		r.addEmptied(path)
	}
	warnings, open := by.settle(r.Config().Rules.Grants, in)
	r.warnings, r.Faults = warnings, append(r.Faults, open...)
	return r
}

// addValues adds to all the tables and values of a file. The error says why it is not TOML, or that they are too many.
func addValues(all *int, file File) error {
	w, err := parse(file)
	if err != nil {
		return err
	}
	if *all+w.values > maxValues {
		return crowded(file.Path)
	}
	*all += w.values
	return nil
}

// isBlank reports whether a file has neither a value nor a comment.
func isBlank(text []byte) bool { return len(bytes.TrimSpace(text)) == 0 }

// saysNothing reports whether no file of r has a table or value.
func (r Reading) saysNothing() bool {
	return !slices.ContainsFunc(r.Files, func(file File) bool {
		text, err := plainText(file)
		return err != nil || countValues(text) > 0
	})
}

// addEmptied takes a file that has lost what it said out of those that count.
func (r *Reading) addEmptied(path string) {
	r.Files = slices.DeleteFunc(r.Files, func(file File) bool { return file.Path == path })
	r.addFault(fmt.Errorf("%s: nothing is in it, as after a power cut while it was saved: write it anew, or remove it",
		path))
}

// After returns r with a fault for each file that has nothing in it, and had in the configuration last in force.
func (r Reading) After(last Reading) Reading {
	for _, before := range last.Files {
		isEmptied := func(file File) bool { return file.Path == before.Path && isBlank(file.Text) }
		if !isBlank(before.Text) && slices.ContainsFunc(r.Files, isEmptied) {
			r.addEmptied(before.Path)
		}
	}
	return r
}

// addFault notes a fault, which a folder gives each file in it.
func (r *Reading) addFault(err error) {
	same := func(other error) bool { return other.Error() == err.Error() }
	if !slices.ContainsFunc(r.Faults, same) {
		r.Faults = append(r.Faults, err)
	}
}

// faultWith is every fault of r, whose files say c, and of its elements; nil: there is none.
func (r Reading) faultWith(c Config) error {
	err := r.fault()
	return errors.Join(err, c.faults.err(err == nil))
}

// None is a configuration of which nothing is in force, and why. Its source is what the files of r say, as far as there
// are any: a source that has given nothing can be another later.
func (r Reading) None(why string) Config {
	c := Config{Source: Source{Fault: why}, Callers: defaultCallers, Rules: agent.Rules{NoRules: why}}
	if len(r.Files) > 0 {
		c.Source = r.Config().Source
	}
	return c
}

// fault is every reason why r is not the whole configuration; nil: it is.
func (r Reading) fault() error {
	all := r.Faults
	if r.Missing {
		all = append([]error{fmt.Errorf("%s: %w: write one, as /usr/share/perceptd/config.example.toml shows it; "+
			"perceptd --check --config %s finds its faults", r.path, errNotThere, r.path)}, all...)
	}
	return errors.Join(all...)
}

// extraFiles lists the .toml files of a folder, which need not be there, in the order of their names, and what else is
// in it.
func extraFiles(dir string, by *trust) (files, unread []string, err error) {
	entries, err := by.list(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, dangling(dir)
	}
	if err != nil {
		return nil, nil, err
	}
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		if why := whyUnread(entry); why != "" {
			unread = append(unread, path+": "+why)
			continue
		}
		files = append(files, path)
	}
	return files, unread, nil
}

// whyUnread says why what is in config.d is not read; empty: it is.
func whyUnread(entry os.DirEntry) string {
	const ending = ".toml"
	name := entry.Name()
	lower := strings.ToLower(name)
	switch {
	case strings.HasPrefix(name, "."):
		return "a name that begins with a dot is an editor's or a hidden file's, and is not read"
	case strings.HasSuffix(name, ending):
		return ""
	case entry.IsDir():
		return "a folder is not read: put the files into config.d itself"
	case strings.HasSuffix(lower, ending):
		return "not read, since its name does not end in .toml in lower case: rename it to " +
			name[:len(name)-len(ending)] + ending
	case strings.Contains(lower, ending):
		return "not read, since its name does not end in .toml, as that of a copy that an editor or a package leaves"
	}
	return "not read, since its name does not end in .toml: rename it if it is to count"
}

// errNotThere is that a file is not there, and not a link that leads to nothing either.
var errNotThere = errors.New("not there")

// readFile reads a configuration file that only those who are trusted can have written.
func readFile(path string, by *trust) ([]byte, error) {
	text, _, err := readTrusted(path, maxFile, by)
	if errors.Is(err, fs.ErrNotExist) {
		if err := dangling(path); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%s: %w", path, errNotThere)
	}
	return text, err
}

// dangling names the link at path, or on the way to it, that leads nowhere; nil: there is none.
func dangling(path string) error {
	for {
		target, err := os.Readlink(path)
		if err == nil {
			_, err = os.Stat(path)
			if errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%s: a link to nothing, since %s is not there: put it there, or remove the link",
					path, target)
			}
		}
		folder := filepath.Dir(path)
		if folder == path {
			return nil
		}
		path = folder
	}
}

// IsGone reports whether a file was taken away. Below a link that leads nowhere, as where a partition is not mounted,
// that is not known.
func IsGone(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist) && dangling(path) == nil
}
