package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"perceptd/agent/lock"
)

// Hold has this process alone keep its state in dir, which is made if need be, until it closes what is returned. Two
// processes would overwrite each other's files. The error names the process that holds dir already (lock.HeldError), or
// says why dir is of no use to keep anything in. What is in it can be read all the same.
func Hold(dir string) (*lock.Folder, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	if err := shut(dir); err != nil && !errors.Is(err, unix.EROFS) { // one that is only read is held as well
		return nil, err
	}
	folder, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	held, err := lock.Take(folder)
	var by lock.HeldError
	if errors.As(err, &by) {
		by.Does = "keeps its state in " + dir
		return nil, by
	}
	return held, err
}

// shut refuses a folder that is of no use to keep anything in, and shuts it to everybody but root and this process's user.
func shut(dir string) error {
	info, err := os.Stat(dir)
	switch {
	case err != nil:
		return err
	case !info.IsDir():
		return &openError{dir + " is not a directory", moveAway(dir)}
	case !ours(info):
		return &openError{"the owner of " + dir + " is neither root nor the user that perceptd runs as", fmt.Sprintf("as root: chown %s %s", runsAs(os.Geteuid()), dir)}
	case info.Mode().Perm()&othersMayChange != 0:
		return &openError{fmt.Sprintf("mode %04o of %s lets others write there", info.Mode().Perm(), dir), "chmod go-w " + dir}
	case info.Mode().Perm()&onlyForOurs != 0: // who can open it can lock it
		return os.Chmod(dir, 0o700)
	}
	return nil
}
