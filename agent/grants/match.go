package grants

import (
	"errors"
	"fmt"
	"math/bits"
	"regexp"
	"strings"
)

// Match says which callers a grant is for. Exactly one of module, unit, image, user and group names them.
type Match struct {
	// Module matches every caller on that module's own socket.
	Module string

	// Unit matches processes of that systemd service, outside of containers.
	Unit string

	// Image matches containers of that image: its ID (sha256:…), or a registry's digest (name@sha256:…).
	Image string

	// UID matches processes of that user outside of containers and of pid namespaces of their own. Inside of one a uid
	// says nothing: root of one container looks like root of every other.
	UID *uint32

	// User is the name that UID was configured as, for people; empty when it was a number.
	User string

	// GID matches processes of that group, their own or a supplementary one, where UID would count.
	GID *uint32

	// Group is the name that GID was configured as, for people; empty when it was a number.
	Group string
}

// IsSame reports whether m and o match the same callers, however they are written.
func (m Match) IsSame(o Match) bool { return m.Subject() == o.Subject() }

// Caller returns a caller that m matches, and that has nothing else that a grant could match.
func (m Match) Caller() Caller {
	c := Caller{Module: m.Module, Unit: m.Unit, UID: NoID, GID: NoID}
	switch {
	case m.Image != "":
		c.Container = ContainerOf(m.Image)
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

// kind is what a grant identifies its callers by. A lower kind is more specific.
type kind uint8

const (
	byModule kind = iota + 1
	byUnit        // as specific as byImage: no caller has both
	byImage
	byUID
	byGID
)

func (k kind) String() string {
	return [...]string{"nothing", "module", "unit", "container_image", "user or uid", "group or gid"}[k]
}

// Kinds is a set of the kinds of caller that a grant can be for.
type Kinds uint8

const (
	Modules Kinds = 1 << iota
	Units
	Images
	Users
	Groups

	AllKinds = Modules | Units | Images | Users | Groups
)

// has reports whether k is one of the kinds.
func (k Kinds) has(one kind) bool { return one != 0 && k>>(one-byModule)&1 != 0 }

// String names the kinds as grants do: "module, unit".
func (k Kinds) String() string {
	var all []string
	for one := byModule; one <= byGID; one++ {
		if k.has(one) {
			all = append(all, one.String())
		}
	}
	return strings.Join(all, ", ")
}

// Subject is the module, unit, image, user or group that a grant is for. Subjects can be compared, and the zero value
// matches no caller.
type Subject struct {
	kind kind
	name string // of a module, unit or image
	id   uint32 // of a user or group
}

// Subject returns the subject that m names.
func (m Match) Subject() Subject {
	switch {
	case m.Module != "":
		return Subject{kind: byModule, name: m.Module}
	case m.Unit != "":
		return Subject{kind: byUnit, name: m.Unit}
	case m.Image != "":
		return Subject{kind: byImage, name: m.Image}
	case m.UID != nil:
		return Subject{kind: byUID, id: *m.UID}
	case m.GID != nil:
		return Subject{kind: byGID, id: *m.GID}
	}
	return Subject{}
}

// String returns the canonical form of s, which no other subject has. It never changes: the header secrets of the
// loopback listener are derived from it.
func (s Subject) String() string {
	switch s.kind {
	case byModule:
		return "module " + s.name
	case byUnit:
		return "unit " + s.name
	case byImage:
		return "container_image " + s.name
	case byUID:
		return fmt.Sprintf("uid %d", s.id)
	case byGID:
		return fmt.Sprintf("gid %d", s.id)
	}
	return ""
}

// matches reports whether c belongs to s, whether or not more specific grants match c too.
func (s Subject) matches(c *Caller) bool {
	for one := range c.subjects {
		if one == s {
			return true
		}
	}
	return false
}

// kinds returns the kinds of caller that m names, of which one is right. A match that names none may mean any.
func (m Match) kinds() (all Kinds) {
	for i, named := range [...]bool{m.Module != "", m.Unit != "", m.Image != "", m.UID != nil, m.GID != nil} {
		if named {
			all |= Modules << i
		}
	}
	if all == 0 {
		return AllKinds
	}
	return all
}

const maxUnit = 255 // systemd's own limit for a unit's name

var (
	validUnit   = regexp.MustCompile(`^[A-Za-z0-9:_.@\\-]+\.service$`)
	validDigest = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	validRepo   = regexp.MustCompile(`^[a-z0-9][a-zA-Z0-9._:/-]*$`)
)

// UnitName returns the service that a configuration means by name: .service is added to a name without a suffix.
func UnitName(name string) string {
	for _, suffix := range [...]string{
		".service", ".scope", ".slice", ".socket", ".mount", ".target", ".timer", ".path", ".swap", ".device",
	} {
		if strings.HasSuffix(name, suffix) {
			return name
		}
	}
	return name + ".service"
}

// Check returns what is wrong with m, or nil.
func (m Match) Check() error {
	switch {
	case bits.OnesCount8(uint8(m.kinds())) != 1:
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
		return fmt.Errorf("container_image %q is a tag, and tags move: "+
			"name the image's ID (sha256:…) or digest (name@sha256:…), as docker image inspect shows them", image)
	}
	return fmt.Errorf(
		"container_image %q is neither sha256: and 64 hexadecimal digits in lower case, nor a name, @ and that", image)
}
