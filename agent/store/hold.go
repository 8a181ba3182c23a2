package store

import (
	"errors"
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
