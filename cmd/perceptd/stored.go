package main

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/socket"
	"perceptd/systemd"
)

// storedModule begins the name by which systemd keeps a module's listener while the daemon restarts, so that whoever
// connects meanwhile waits. After it come the module's name, a dash, and the number of the socket's inode.
const storedModule = "module-"

func storedName(module string, inode uint64) string {
	return storedModule + module + "-" + strconv.FormatUint(inode, 10)
}

// parseStored is storedName's opposite.
func parseStored(name string) (module string, inode uint64, ok bool) {
	rest, ok := strings.CutPrefix(name, storedModule)
	dash := strings.LastIndexByte(rest, '-')
	if !ok || dash < 1 {
		return "", 0, false
	}
	module = rest[:dash]
	inode, err := strconv.ParseUint(rest[dash+1:], 10, 64)
	return module, inode, err == nil && storedName(module, inode) == name && filepath.IsLocal(module) && !strings.Contains(module, "/")
}

// takeStored takes up the modules' listeners that an earlier start had stored, out of what systemd gave. What is no
// longer of use is let go of; setModules makes anew what is missing, and takes away what is no longer configured.
func (s *sockets) takeStored(given map[string]*net.UnixListener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, inner := range given {
		if !strings.HasPrefix(name, storedModule) {
			continue
		}
		l, module, err := s.takeUp(name, inner)
		if err != nil {
			s.log.Info("a stored socket is of no use any more", zap.String("name", name), zap.Error(err))
			s.letGo(name)
			continue
		}
		s.modules[module] = l
		s.remember(module, name)
		s.serveModule(module, l)
	}
}

func (s *sockets) takeUp(name string, inner *net.UnixListener) (*socket.Listener, string, error) {
	module, inode, ok := parseStored(name)
	switch {
	case !ok:
		return nil, "", fmt.Errorf("its name says nothing: %w", inner.Close())
	case s.modules[module] != nil:
		_ = inner.Close()
		return nil, "", fmt.Errorf("module %s has one already", module)
	}
	l, err := s.held.Adopt(filepath.Join(api.ModulesDirName, module), api.TokenSocketName, inner, inode)
	return l, module, err
}

// store has systemd keep a module's listener. The lock is held.
func (s *sockets) store(module string, l *socket.Listener) {
	if !s.notify.Enabled() {
		return
	}
	name, err := s.tryToStore(module, l)
	if err != nil {
		s.unkept = append(s.unkept, module)
		s.unkeptWhy = err
		return
	}
	s.remember(module, name)
}

// behind reports whether systemd did not take a socket, and may later.
func (s *sockets) behind() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.unkept) > 0 && errors.Is(s.unkeptWhy, systemd.ErrBusy)
}

// catchUp has systemd keep the sockets that it did not take.
func (s *sockets) catchUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	missed := s.unkept
	s.unkept, s.unkeptWhy = nil, nil
	for _, name := range missed {
		if l := s.modules[name]; l != nil && s.stored[name] == "" {
			s.store(name, l)
		}
	}
	if len(missed) > 0 && len(s.unkept) == 0 {
		s.log.Info("modules' sockets are kept through a restart again", zap.Int("modules", len(missed)))
	}
}

func (s *sockets) tryToStore(module string, l *socket.Listener) (name string, err error) {
	if len(s.stored) >= s.room {
		return "", fmt.Errorf("systemd keeps %d sockets for perceptd and has them: raise FileDescriptorStoreMax= (systemctl edit perceptd), before systemd 254 with Environment=FDSTORE= of the same number", s.room)
	}
	inode, err := l.Inode()
	if err != nil {
		return "", err
	}
	name = storedName(module, inode)
	return name, storeListener(s.notify, name, l)
}

// unkeptTrouble tells in a line which modules' sockets are not kept through a restart, or is empty. The lock is held.
func (s *sockets) unkeptTrouble() string {
	if len(s.unkept) == 0 {
		return ""
	}
	named := "module " + s.unkept[0]
	if more := len(s.unkept) - 1; more > 0 {
		named += fmt.Sprintf(" and %d more", more)
	}
	return fmt.Sprintf("%s: the socket is not kept through a restart, and whoever asks meanwhile is turned away: %v", named, s.unkeptWhy)
}

// storeListener does not go through the listener's File, whose Fd would have all its duplicates block.
func storeListener(n systemd.Notify, name string, l syscall.Conn) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	var fault error
	err = raw.Control(func(fd uintptr) { fault = n.Store(name, int(fd)) })
	return errors.Join(err, fault)
}

// remember notes what systemd has stored a module's listener by. The lock is held.
func (s *sockets) remember(module, name string) {
	if s.stored == nil {
		s.stored = make(map[string]string)
	}
	s.stored[module] = name
}

// discard takes a module's listener out of systemd's store. The lock is held.
func (s *sockets) discard(module string) {
	if name, stored := s.stored[module]; stored {
		s.letGo(name)
		delete(s.stored, module)
	}
}

// leaveStored has the sockets that systemd keeps stay at their paths when their listeners are closed here.
func (s *sockets) leaveStored() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for module := range s.stored {
		s.modules[module].Leave()
	}
}

// removeFolders takes away the folders of modules that are no longer configured, also of an earlier start's. What a
// module has put into its own stays, and the folder with it.
func (s *sockets) removeFolders(modules []string) {
	there, err := s.held.Folders(api.ModulesDirName)
	if err != nil {
		s.log.Warn("the modules' folders cannot be listed", zap.Error(err))
	}
	for _, module := range there {
		if slices.Contains(modules, module) {
			continue
		}
		if err := s.held.RemoveFolder(filepath.Join(api.ModulesDirName, module), api.TokenSocketName); err != nil {
			s.log.Warn("the folder of a module that was removed stays", zap.String("module", module), zap.Error(err))
		}
	}
}

// letGo has systemd close what it keeps by that name. Where it cannot be told, the next start finds it of no use.
func (s *sockets) letGo(name string) {
	if err := s.notify.Discard(name); err != nil {
		s.log.Warn("systemd was not told to let go of a socket", zap.String("name", name), zap.Error(err))
	}
}

// discardUnknown takes out of systemd's store what was passed and is of no use. Of two by one name the one that was found
// is stored again, since both go.
func discardUnknown(n systemd.Notify, unknown []string, found map[string]*net.UnixListener) error {
	var fault error
	for _, name := range unknown {
		fault = errors.Join(fault, n.Discard(name))
		if l := found[name]; l != nil {
			fault = errors.Join(fault, storeListener(n, name, l))
		}
	}
	return fault
}
