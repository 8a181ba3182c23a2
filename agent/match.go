package agent

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// Match says which callers a grant is for. Exactly one of module, unit, image, user and group names them.
type Match struct {
	// Module is for whoever comes in on that module's own socket.
	Module string

	// Unit is for processes of that systemd service, outside of containers.
	Unit string

	// Image is for containers of that image: its ID (sha256:…), or a registry's digest (name@sha256:…).
	Image string

	// UID is for processes of that user outside of containers and of pid namespaces of their own: inside of one a uid says
	// nothing, since root of one container is root of every other.
	UID *uint32

	// User is the name that UID was configured as, for people; empty when it was a number.
	User string

	// GID is for processes of that group where UID would count, be it their own or a supplementary one.
	GID *uint32

	// Group is the name that GID was configured as, for people; empty when it was a number.
	Group string
}

// Subject names whom a grant is for in a form that never changes and that no two of them share.
func (m Match) Subject() string {
	switch w := m.who(); w.kind {
	case byModule:
		return "module " + w.name
	case byUnit:
		return "unit " + w.name
	case byImage:
		return "container_image " + w.name
	case byUID:
		return fmt.Sprintf("uid %d", w.id)
	case byGID:
		return fmt.Sprintf("gid %d", w.id)
	}
	return ""
}

// IsSame reports whether m and o are for the same callers, however they are written.
func (m Match) IsSame(o Match) bool { return m.who() == o.who() }

// Caller returns a caller that has what m is for, and nothing else that a grant could be for.
func (m Match) Caller() Caller {
	c := Caller{Module: m.Module, Unit: m.Unit, UID: NoID, GID: NoID}
	switch {
	case m.Image != "":
		c.Container = &Container{Name: "of image " + m.Image, Digest: m.Image, RepoDigests: []string{m.Image}}
	case m.UID != nil:
		c.UID = *m.UID
	case m.GID != nil:
		c.GID = *m.GID
	}
	return c
}

func (m Match) String() string {
	switch {
	case m.Module != "":
		return "module " + m.Module
	case m.Unit != "":
		return "unit " + m.Unit
	case m.Image != "":
		return "container image " + m.Image
	case m.UID != nil && m.User != "":
		return fmt.Sprintf("user %s (uid %d)", m.User, *m.UID)
	case m.UID != nil:
		return fmt.Sprintf("uid %d", *m.UID)
	case m.GID != nil && m.Group != "":
		return fmt.Sprintf("group %s (gid %d)", m.Group, *m.GID)
	case m.GID != nil:
		return fmt.Sprintf("gid %d", *m.GID)
	}
	return "nobody"
}

// kind is a kind of grant, by what it knows a caller by: the lower, the more specific.
type kind uint8

const (
	byModule kind = iota + 1
	byUnit        // as specific as byImage: no caller is of both
	byImage
	byUID
	byGID
)

func (k kind) String() string {
	return [...]string{"nothing", "module", "unit", "container_image", "user or uid", "group or gid"}[k]
}

// who is what a grant knows its callers by.
type who struct {
	kind kind
	name string // of a module, unit or image
	id   uint32 // of a user or group
}

func (m *Match) who() who {
	switch {
	case m.Module != "":
		return who{kind: byModule, name: m.Module}
	case m.Unit != "":
		return who{kind: byUnit, name: m.Unit}
	case m.Image != "":
		return who{kind: byImage, name: m.Image}
	case m.UID != nil:
		return who{kind: byUID, id: *m.UID}
	case m.GID != nil:
		return who{kind: byGID, id: *m.GID}
	}
	return who{}
}

// covers reports whether a grant for w is one for c, whatever more specific grants there are.
//
// A module's socket is told by its path alone, and may be mounted into a container: on it neither user,
// group nor unit counts. Inside a container they say nothing either, and in a pid namespace of its own a unit's process is
// known by the unit alone.
func (w who) covers(c *Caller) bool {
	switch w.kind {
	case byModule:
		return c.Module == w.name
	case byImage:
		return c.hasImage(w.name)
	case byUnit:
		return c.isLocal() && c.Unit == w.name
	case byUID:
		return c.HasUser() && c.UID == w.id
	case byGID:
		return c.HasUser() && c.inGroup(w.id)
	}
	return false
}

// names counts the ways in which m names callers; exactly one is right.
func (m *Match) names() int {
	n := 0
	for _, named := range [...]bool{m.Module != "", m.Unit != "", m.Image != "", m.UID != nil, m.GID != nil} {
		if named {
			n++
		}
	}
	return n
}

const maxUnit = 255 // systemd's own limit for a unit's name

var (
	validUnit   = regexp.MustCompile(`^[A-Za-z0-9:_.@\\-]+\.service$`)
	validDigest = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	validRepo   = regexp.MustCompile(`^[a-z0-9][a-zA-Z0-9._:/-]*$`)
)

// UnitName returns the service that a configuration means by name: one without a suffix gets .service.
func UnitName(name string) string {
	for _, suffix := range [...]string{".service", ".scope", ".slice", ".socket", ".mount", ".target", ".timer", ".path", ".swap", ".device"} {
		if strings.HasSuffix(name, suffix) {
			return name
		}
	}
	return name + ".service"
}

// Check says what is wrong with m, or nil.
func (m Match) Check() error {
	switch {
	case m.names() != 1:
		return errors.New("a grant's caller is exactly one of module, unit, container_image, user, uid, group and gid")
	case m.Module != "" && !validName.MatchString(m.Module):
		return fmt.Errorf("module name %q: letters, digits, dot, dash and underscore, at most 63", m.Module)
	case m.Unit != "":
		return checkUnit(m.Unit)
	case m.Image != "":
		return checkImage(m.Image)
	}
	return nil
}

func checkUnit(unit string) error {
	switch {
	case !strings.HasSuffix(unit, ".service"):
		return fmt.Errorf("unit %q is no service: others can be made or joined by the processes in them", unit)
	case len(unit) > maxUnit || !validUnit.MatchString(unit) || strings.HasPrefix(unit, "."):
		return fmt.Errorf("unit %q is no service's name: write it as systemctl shows it", unit)
	case strings.HasSuffix(unit, "@.service"):
		return fmt.Errorf("unit %q is a template: name its instances, each in a grant of its own", unit)
	}
	return nil
}

func checkImage(image string) error {
	repo, digest, named := strings.Cut(image, "@")
	if !named {
		repo, digest = "", image
	}
	switch {
	case validDigest.MatchString(digest) && (!named || validRepo.MatchString(repo)):
		return nil
	case !strings.Contains(image, "sha256:"):
		return fmt.Errorf("container_image %q is a tag, and tags move: name the image's ID (sha256:…) or digest (name@sha256:…), as docker image inspect shows them", image)
	}
	return fmt.Errorf("container_image %q is neither sha256: and 64 hexadecimal digits in lower case, nor a name, @ and that", image)
}
