package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/socket"
)

const (
	// giveTimeout is how long root may take to give folders away: systemd starts a process for it.
	giveTimeout = 5 * time.Second
	// longestGiven bounds what is read of root's answer, a line for each folder.
	longestGiven = 1 << 20
)

// giveFolders has root give perceptd those of the modules' folders that a container engine has made, as it does for a
// container that starts before perceptd has made them. Root is asked by perceptd-modules.socket, since this process may
// not change an owner.
func (s *sockets) giveFolders() {
	foreign := s.foreign()
	if len(foreign) == 0 {
		return
	}
	answer, err := askForFolders(s.giver)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left = make(map[string]string)
	for _, module := range foreign {
		at := slices.IndexFunc(answer, func(g socket.Given) bool { return g.Folder == module })
		switch {
		case at >= 0 && answer[at].Left != "":
			s.left[module] = "root leaves it so, since " + answer[at].Left
		case at >= 0:
			s.log.Warn("a container was started before perceptd, and its engine made the module's folder: "+
				"it is perceptd's now",
				zap.String("module", module), zap.Uint32("was_of_user", answer[at].User))
		case err != nil:
			s.left[module] = fmt.Sprintf("root, who gives it to perceptd, does not answer (%v): sudo perceptctl "+
				"module-folders does the same; or", err)
		}
	}
}

// foreign lists the modules that are to have a socket and whose folder is another user's.
func (s *sockets) foreign() (modules []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, folder := range s.dir.Foreign(api.ModulesDirName) {
		if slices.Contains(s.wanted, folder) {
			modules = append(modules, folder)
		}
	}
	return modules
}

// askForFolders asks root, at the socket of that path, to give the modules' folders away, and returns what became of
// them.
func askForFolders(path string) (given []socket.Given, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), giveTimeout)
	defer cancel()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	defer conn.Close()
	lines := bufio.NewScanner(io.LimitReader(conn, longestGiven))
	for lines.Scan() {
		if g, ok := socket.ParseGiven(lines.Text()); ok {
			given = append(given, g)
		}
	}
	if ctx.Err() != nil {
		return given, fmt.Errorf("%s: no answer in %v", path, giveTimeout)
	}
	return given, lines.Err()
}
