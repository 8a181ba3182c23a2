package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/server"
	"perceptd/agent/socket"
	"perceptd/systemd"
)

// sockets are the daemon's listeners: two from systemd, or made here when it was started by hand, and
// one for each module, always made here.
type sockets struct {
	dir     *socket.Dir
	server  *server.Server
	log     *zap.Logger
	failed  chan<- error // a listener that can accept no more
	changed func()       // called when there is trouble, or an end of it, that nobody asked for
	notify  systemd.Notify
	room    int    // how many sockets systemd keeps
	giver   string // the socket at which root is asked to give modules' folders to perceptd
	serving sync.WaitGroup

	always map[string]net.Addr // the two that are there as long as the daemon is, by name

	mu      sync.Mutex // protects what follows
	wanted  []string   // the modules that are to have a socket
	modules map[string]*socket.Listener
	stored  map[string]string          // what systemd has stored them by, by module
	trouble map[string]string          // why modules have no socket
	left    map[string]string          // why root has left a module's folder to another user
	folders map[string]socket.FolderID // where modules' sockets were last
	renewed []string                   // modules whose folder is another than it was

	shut      map[string]net.Addr // of always, those that the daemon may not connect to, so that they are not checked
	unkept    []string            // modules whose sockets systemd does not keep
	unkeptWhy error               // the latest reason
}

// moduleDescriptors is how many descriptors a module's socket takes: its listener, its folder and its inode.
const moduleDescriptors = 3

const (
	tokenSocketMode = 0o666 // who may have which token is decided by grants, not by the file
	adminSocketMode = 0o660 // who may administer is decided by the file
)

// open returns the token and admin sockets: those that systemd gave, by name, or ones made here.
func (s *sockets) open(given map[string]*net.UnixListener) (token, admin net.Listener, err error) {
	if token, err = s.takeOrMake(given[systemd.TokenSocket], api.TokenSocketName, tokenSocketMode); err != nil {
		return nil, nil, err
	}
	if admin, err = s.takeOrMake(given[systemd.AdminSocket], api.AdminSocketName, adminSocketMode); err != nil {
		return nil, nil, errors.Join(err, token.Close())
	}
	return token, admin, nil
}

func (s *sockets) takeOrMake(given *net.UnixListener, name string, mode os.FileMode) (net.Listener, error) {
	if given != nil {
		given.SetUnlinkOnClose(false) // the path is systemd's: clients wait there through a restart
		return given, nil
	}
	made, err := s.dir.Listen("", name, mode, -1)
	if err != nil {
		return nil, err // and not a net.Listener that holds a nil pointer
	}
	return made, nil
}

// answer serves l in the background until l is closed.
func (s *sockets) answer(name string, l net.Listener, serve func(net.Listener) error) {
	s.serving.Go(func() {
		if err := serve(l); err != nil {
			select {
			case s.failed <- fmt.Errorf("%s: %w", name, err):
			default: // one failure is enough to stop for
			}
		}
	})
}

// serve answers on the two sockets that are always there.
func (s *sockets) serve(token, admin net.Listener) {
	s.always = map[string]net.Addr{"token socket": token.Addr(), "admin socket": admin.Addr()}
	s.answer("token socket", token, func(l net.Listener) error { return s.server.ServeTokens(l, "") })
	s.answer("admin socket", admin, s.server.ServeAdmin)
}

// check asks for health on the two sockets, as a client would: each must accept and answer. The modules'
// are left out: what a module does to its own must not have systemd restart the daemon for all.
func (s *sockets) check(ctx context.Context) error {
	for name, at := range s.always {
		err := askHealth(ctx, at)
		shut := errors.Is(err, fs.ErrPermission)
		s.noteShut(name, at, shut)
		if err != nil && !shut {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// noteShut notes whether the daemon may connect to one of its sockets. That it may not is no standstill, which a
// restart would end: it is how an earlier version's unit, or an administrator's, has made the socket.
func (s *sockets) noteShut(name string, at net.Addr, shut bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shut[name] == nil && shut {
		s.log.Warn("a socket is not checked: the daemon may not connect to it", zap.Stringer("socket", at))
		if s.shut == nil {
			s.shut = make(map[string]net.Addr)
		}
		s.shut[name] = at
		s.changed()
	}
	if s.shut[name] != nil && !shut {
		delete(s.shut, name)
		s.changed()
	}
}

func askHealth(ctx context.Context, at net.Addr) error {
	for {
		answer, err := healthAnswer(ctx, at)
		switch {
		case err != nil:
			return err
		case answer == healthy:
			return nil
		case answer != noRoom:
			return fmt.Errorf("answered %q", answer)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("answered %q until %w", answer, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// The beginnings of answers: of one that is well, and of one that has no room just now.
const (
	healthy = "HTTP/1.1 200 "
	noRoom  = "HTTP/1.1 429 "
)

func healthAnswer(ctx context.Context, at net.Addr) (string, error) {
	conn, err := connect(ctx, at)
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	if due, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(due)
	}
	const request = "GET " + api.PathHealth + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
	if _, err := io.WriteString(conn, request); err != nil {
		return "", err
	}
	answer := make([]byte, len(healthy))
	_, err = io.ReadFull(conn, answer)
	return string(answer), err
}

// connect waits for a place in the socket's queue, which others may have filled: the kernel answers EAGAIN then.
func connect(ctx context.Context, at net.Addr) (net.Conn, error) {
	var dialer net.Dialer
	for {
		conn, err := dialer.DialContext(ctx, at.Network(), at.String())
		if !errors.Is(err, syscall.EAGAIN) {
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("its queue stays full: %w", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// setModules gives each of the named modules a socket, and takes it from the others. A socket that cannot
// be made is trouble for its module and for no other: each can spoil its own folder, where it is mounted
// writable. It is tried again by mend, and at the next reload.
func (s *sockets) setModules(modules []string) {
	s.mu.Lock()
	s.wanted = slices.Clone(modules)
	s.mu.Unlock()
	s.mend()
}

// mend gives the modules that are to have a socket the one that they lack.
func (s *sockets) mend() {
	s.giveFolders()
	if s.fill() { // an engine has made a folder since
		s.giveFolders()
		s.fill()
	}
}

// lacking reports whether a module lacks its socket.
func (s *sockets) lacking() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.wanted, func(name string) bool {
		return s.modules[name] == nil || gone(s.modules[name])
	})
}

// fill makes the sockets that modules lack, takes away those of others, and reports whether a folder is another user's
// of which root was not asked.
func (s *sockets) fill() (unasked bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, l := range s.modules {
		if !slices.Contains(s.wanted, name) || gone(l) {
			s.discardLocked(name)
			_ = l.Close()
			delete(s.modules, name)
		}
	}
	s.removeDeadLocked()
	known, unkept := s.trouble, len(s.unkept)
	s.trouble, s.unkept = make(map[string]string), nil
	for _, name := range s.wanted {
		if l := s.modules[name]; l != nil {
			if s.stored[name] == "" {
				s.storeLocked(name, l) // there may be room by now
			}
			continue
		}
		l, err := s.dir.Listen(filepath.Join(api.ModulesDirName, name), api.TokenSocketName, tokenSocketMode, -1)
		if err != nil {
			_, isForeign := errors.AsType[*socket.ForeignError](err)
			why, asked := s.left[name]
			unasked = unasked || isForeign && !asked
			s.trouble[name] = noSocket(name, err, isForeign, why)
			if s.trouble[name] != known[name] {
				s.log.Error("a module has no socket",
					zap.String("module", name), zap.Error(err), zap.String("left", why))
			}
			continue
		}
		s.modules[name] = l
		s.noteFolderLocked(name, l.Folder())
		s.storeLocked(name, l)
		s.serveModule(name, l)
	}
	if len(s.unkept) > 0 && len(s.unkept) != unkept {
		s.log.Warn("modules' sockets are not kept through a restart",
			zap.Int("modules", len(s.unkept)), zap.String("first", s.unkept[0]), zap.Error(s.unkeptWhy))
	}
	return unasked
}

// noSocket says why a module has no socket, and what mends it.
func noSocket(module string, why error, isForeign bool, left string) string {
	text := fmt.Sprintf("module %s has no socket: %v", module, why)
	if isForeign {
		text += fmt.Sprintf(": %s: stop its container, remove the folder, perceptctl reload, then start the "+
			"container again",
			cmp.Or(left, "root was not asked to give it to perceptd"))
	}
	return text
}

// noteFolderLocked notes which folder a module's socket is in.
func (s *sockets) noteFolderLocked(module string, folder socket.FolderID) {
	if before, known := s.folders[module]; known && before != folder {
		s.log.Warn("a module's folder is another than it was: start containers that have the one before mounted again",
			zap.String("module", module))
		if !slices.Contains(s.renewed, module) {
			s.renewed = append(s.renewed, module)
		}
	}
	if s.folders == nil {
		s.folders = make(map[string]socket.FolderID)
	}
	s.folders[module] = folder
}

// renewals says, once, which modules' folders are others than they were, and what follows from it.
func (s *sockets) renewals() (sentences []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, module := range s.renewed {
		sentences = append(sentences, fmt.Sprintf("the folder of module %s was removed, and is another now: a "+
			"container that was started before has the old one mounted, where no socket comes any more: start it "+
			"again", module))
	}
	s.renewed = nil
	return sentences
}

// serveModule answers a module in the background.
func (s *sockets) serveModule(name string, l *socket.Listener) {
	s.answer("socket of module "+name, l, func(l net.Listener) error { return s.server.ServeTokens(l, name) })
}

// gone reports whether l's socket is no longer at its path.
func gone(l *socket.Listener) bool {
	info, err := os.Lstat(l.Addr().String())
	return err != nil || info.Mode().Type() != os.ModeSocket
}

// troubles lists the modules that have no socket, and why.
func (s *sockets) troubles() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []string
	for _, name := range slices.Sorted(maps.Keys(s.trouble)) {
		all = append(all, s.trouble[name])
	}
	for _, name := range slices.Sorted(maps.Keys(s.shut)) {
		at := s.shut[name].String()
		mend := "systemctl stop perceptd.service perceptd.socket perceptd-admin.socket, " +
			"then systemctl start perceptd.service makes it anew as its unit says"
		if at == api.DefaultAdminSocket {
			mend = "systemd-tmpfiles --create perceptd.conf gives it its owner"
		}
		all = append(all, fmt.Sprintf("perceptd cannot check that it answers on %s, where it may not connect: %s",
			at, mend))
	}
	if unkept := s.unkeptTroubleLocked(); unkept != "" {
		all = append(all, unkept)
	}
	for _, name := range slices.Sorted(maps.Keys(s.modules)) {
		if gone(s.modules[name]) {
			all = append(all, fmt.Sprintf(
				"module %s has no socket any more, it was removed: perceptd makes it again within a minute, "+
					"perceptctl reload at once", name))
		}
	}
	return all
}

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
	ok = err == nil && storedName(module, inode) == name && filepath.IsLocal(module) && !strings.Contains(module, "/")
	return module, inode, ok
}

// begin takes up the sockets of modules that an earlier start had stored, and gives the named modules theirs.
func (s *sockets) begin(given map[string]*net.UnixListener, modules []string) {
	s.mu.Lock()
	s.wanted = slices.Clone(modules)
	s.mu.Unlock()
	s.giveFolders() // a socket is taken up in a folder of perceptd's alone
	s.takeStored(given)
	s.mend()
}

// takeStored takes up the modules' listeners that an earlier start had stored, out of what systemd gave. What is no
// longer of use is let go of; fill makes anew what is missing, and takes away what is no longer configured.
func (s *sockets) takeStored(given map[string]*net.UnixListener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	there, unlisted := s.dir.Folders(api.ModulesDirName) // before what is missing is made
	for name, inner := range given {
		if !strings.HasPrefix(name, storedModule) {
			continue
		}
		l, module, err := s.adoptLocked(name, inner)
		if err != nil {
			if module, _, ok := parseStored(name); ok && unlisted == nil && !slices.Contains(there, module) {
				s.noteFolderLocked(module, socket.FolderID{}) // another than any that is there
			}
			s.log.Info("a stored socket is of no use any more", zap.String("name", name), zap.Error(err))
			s.discardStored(name)
			continue
		}
		s.modules[module] = l
		s.noteFolderLocked(module, l.Folder())
		s.rememberLocked(module, name)
		s.serveModule(module, l)
	}
}

func (s *sockets) adoptLocked(name string, inner *net.UnixListener) (*socket.Listener, string, error) {
	module, inode, ok := parseStored(name)
	switch {
	case !ok:
		return nil, "", fmt.Errorf("its name says nothing: %w", inner.Close())
	case s.modules[module] != nil:
		_ = inner.Close()
		return nil, "", fmt.Errorf("module %s has one already", module)
	}
	l, err := s.dir.Adopt(filepath.Join(api.ModulesDirName, module), api.TokenSocketName, inner, inode)
	return l, module, err
}

// storeLocked hands a module's listener to systemd, to keep.
func (s *sockets) storeLocked(module string, l *socket.Listener) {
	if !s.notify.Enabled() {
		return
	}
	name, err := s.tryToStoreLocked(module, l)
	if err != nil {
		s.unkept = append(s.unkept, module)
		s.unkeptWhy = err
		return
	}
	s.rememberLocked(module, name)
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
			s.storeLocked(name, l)
		}
	}
	if len(missed) > 0 && len(s.unkept) == 0 {
		s.log.Info("modules' sockets are kept through a restart again", zap.Int("modules", len(missed)))
	}
}

func (s *sockets) tryToStoreLocked(module string, l *socket.Listener) (name string, err error) {
	if len(s.stored) >= s.room {
		return "", fmt.Errorf("systemd keeps %d sockets for perceptd and has them: raise FileDescriptorStoreMax= to "+
			"1000 at most (systemctl edit perceptd), before systemd 254 with Environment=FDSTORE= of the same "+
			"number", s.room)
	}
	inode, err := l.Inode()
	if err != nil {
		return "", err
	}
	name = storedName(module, inode)
	return name, storeListener(s.notify, name, l)
}

// unkeptTroubleLocked says in a line which modules' sockets are not kept through a restart; empty: all are.
func (s *sockets) unkeptTroubleLocked() string {
	if len(s.unkept) == 0 {
		return ""
	}
	named := "module " + s.unkept[0]
	if more := len(s.unkept) - 1; more > 0 {
		named += fmt.Sprintf(" and %d more", more)
	}
	return fmt.Sprintf("%s: the socket is not kept through a restart, and whoever asks meanwhile is turned away: %v",
		named, s.unkeptWhy)
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

// rememberLocked notes the name by which systemd has stored a module's listener.
func (s *sockets) rememberLocked(module, name string) {
	if s.stored == nil {
		s.stored = make(map[string]string)
	}
	s.stored[module] = name
}

// discardLocked takes a module's listener out of systemd's store.
func (s *sockets) discardLocked(module string) {
	if name, stored := s.stored[module]; stored {
		s.discardStored(name)
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

// removeDeadLocked takes away what earlier starts have left of the sockets of modules that are no longer configured.
// Their folders stay: a container that has one mounted finds the socket there when its module is configured again.
func (s *sockets) removeDeadLocked() {
	there, err := s.dir.Folders(api.ModulesDirName)
	if err != nil {
		s.log.Warn("the modules' folders cannot be listed", zap.Error(err))
	}
	for _, module := range there {
		if slices.Contains(s.wanted, module) {
			continue
		}
		if err := s.dir.RemoveDead(filepath.Join(api.ModulesDirName, module), api.TokenSocketName); err != nil {
			s.log.Warn("the socket of a module that was removed stays", zap.String("module", module), zap.Error(err))
		}
	}
}

// discardStored has systemd close what it keeps by that name. If systemd cannot be told, the next start finds it of no
// use.
func (s *sockets) discardStored(name string) {
	if err := s.notify.Discard(name); err != nil {
		s.log.Warn("systemd was not told to let go of a socket", zap.String("name", name), zap.Error(err))
	}
}

// discardUnknown takes out of systemd's store what was passed and is of no use. Of two by one name the one that was
// found is stored again, since both go.
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
