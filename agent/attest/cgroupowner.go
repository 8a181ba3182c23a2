package attest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"syscall"
)

// hierarchies returns where the cgroup hierarchies of systemd may be below their mount point: the unified one, and the
// two of a device that has both kinds.
func (k kernel) hierarchies() []string {
	return []string{k.cgroups, k.cgroups + "/unified", k.cgroups + "/systemd"}
}

// checkOwners returns nil if only trusted users can have made a cgroup below parent, and moved processes into it.
// systemd gives the cgroup of a service with Delegate= to the service's user, who can make any cgroup below it then,
// with any name. Which cgroup a process is in says nothing there.
func (k kernel) checkOwners(trusted trustedOwners, parent, leaf string) error {
	found := false
	for _, hierarchy := range k.hierarchies() {
		for _, file := range []string{parent, parent + "/cgroup.procs", leaf, leaf + "/cgroup.procs"} {
			info, err := os.Lstat(hierarchy + file)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			found = true
			if err := trusted.checkCgroup(file, info); err != nil {
				return err
			}
		}
	}
	if !found {
		return fmt.Errorf("whose its cgroup %s is cannot be looked at in %s", leaf, k.cgroups)
	}
	return nil
}

// checkCgroup returns nil if the cgroup, or its file, is a trusted user's, and no other may write to it.
func (o trustedOwners) checkCgroup(path string, info fs.FileInfo) error {
	stat := info.Sys().(*syscall.Stat_t)
	if !slices.Contains(o.uids, stat.Uid) {
		return fmt.Errorf("its cgroup %s belongs to user %d, who can have made it and have moved any process there",
			path, stat.Uid)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("its cgroup %s has mode %04o: others can have moved any process there",
			path, info.Mode().Perm())
	}
	return nil
}
