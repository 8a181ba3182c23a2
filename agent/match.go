package agent

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

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
