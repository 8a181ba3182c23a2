// Package grants decides which local caller may have which token, and says why. Rules are identities, grants and
// alternates as they were configured; an Authorizer is made of them and answers. The package is pure: it compares
// values, and neither proves who calls nor fetches anything.
package grants

import (
	"fmt"
	"strings"
	"time"
)

// Caller is the local process that asks, as far as it was attested. It is a value: the attestor fills it in, and
// everything after that only compares it.
type Caller struct {
	// Module is the module on whose own socket the caller connected, confirmed as the module's `require` demands; empty
	// on the token socket.
	Module string

	// UID, GID and PID are the peer credentials that the kernel recorded when the caller connected.
	UID, GID uint32
	PID      int32

	// Groups are the supplementary groups that the kernel recorded then (SO_PEERGROUPS).
	Groups []uint32

	// Unit is the systemd service that the whole cgroup path names, as systemd writes it
	// ("cam@3f\\x2dx.service"). Empty: none, or inside a container.
	Unit string

	// Container is the container that the caller runs in. Nil: in none.
	Container *Container

	// Nested is true if the caller has a pid namespace of its own, or one that the daemon cannot see. UID, GID and
	// Groups then say nothing about who it is, as in a container.
	Nested bool

	// Via describes how the caller was identified, if not by its socket. Empty: by its socket.
	Via string

	// Peer is the uid that the kernel gives for the other end of a connection on which a header secret identified the
	// caller. It says nothing of what the caller was granted. Nil: it is not known, or UID says it.
	Peer *uint32
}

// Container is what the container engine says about a container.
type Container struct {
	ID          string   // 64 hexadecimal digits
	Name        string   // without the slash that Docker puts in front
	Image       string   // as it was named when the container was created: a tag may have moved since
	Digest      string   // image ID, sha256:…
	RepoDigests []string // name@sha256:…, under which registries have the image

	// EdgeModule is the IoT Edge module's name, if the owner label is edgeAgent's.
	EdgeModule string

	StartedOn time.Time
}

// ContainerOf returns a container of which nothing is known but its image, by ID or by a registry's digest.
func ContainerOf(image string) *Container {
	return &Container{Name: "of image " + image, Digest: image, RepoDigests: []string{image}}
}

// shortID is how many digits of a container's ID people are shown, as the engines do.
const shortID = 12

// ShortID returns as much of the container's ID as people are shown.
func (c *Container) ShortID() string { return c.ID[:min(len(c.ID), shortID)] }

// NoID is the uid or gid of a caller whose own is not known. The kernel gives it to no process.
const NoID = ^uint32(0)

func (c Caller) String() string {
	if via := c.Via; via != "" {
		c.Via = ""
		return c.String() + " by " + via
	}
	var known []string
	if c.Container != nil && c.Container.ID != "" {
		known = append(known, "container "+c.Container.ShortID())
	}
	switch {
	case c.UID != NoID && c.Nested:
		known = append(known, fmt.Sprintf("uid %d in a pid namespace of its own", c.UID))
	case c.UID != NoID:
		known = append(known, fmt.Sprintf("uid %d", c.UID))
	}
	if c.UID == NoID && c.GID != NoID {
		known = append(known, fmt.Sprintf("gid %d", c.GID))
	}
	if c.PID != 0 {
		known = append(known, fmt.Sprintf("pid %d", c.PID))
	}
	name := "somebody"
	switch {
	case c.Module != "":
		name = "module " + c.Module
	case c.Container != nil:
		name = "container " + c.Container.Name
	case c.Unit != "":
		name = "unit " + c.Unit
	case len(known) > 0:
		name, known = known[0], known[1:]
	}
	if len(known) == 0 {
		return name
	}
	return name + " (" + strings.Join(known, ", ") + ")"
}

// IsSame reports whether c and o, both seen at the other end of one connection, are the same module, unit or container.
func (c *Caller) IsSame(o Caller) bool {
	if (c.Container == nil) != (o.Container == nil) || c.Container != nil && c.Container.ID != o.Container.ID {
		return false
	}
	return c.Module == o.Module && c.Unit == o.Unit
}

// isLocal reports whether the caller is known by where it runs on the device itself. On a module's socket and in a
// container its unit, user and group say nothing.
func (c *Caller) isLocal() bool { return c.Module == "" && c.Container == nil }

// HasUser reports whether UID, GID and Groups say who the caller is.
func (c *Caller) HasUser() bool { return c.isLocal() && !c.Nested }

// subjects yields the subjects that c belongs to, the most specific kind first. One may come twice.
//
// The path of a module's socket is all that identifies a module, and it may be mounted into a container: on it neither
// user, group nor unit counts. Inside a container they say nothing either, and a unit's process in a pid namespace of
// its own is identified by the unit alone.
func (c *Caller) subjects(yield func(Subject) bool) {
	if c.Module != "" && !yield(Subject{kind: byModule, name: c.Module}) {
		return
	}
	if c.Container != nil {
		if !yield(Subject{kind: byImage, name: c.Container.Digest}) {
			return
		}
		for _, digest := range c.Container.RepoDigests {
			if !yield(Subject{kind: byImage, name: digest}) {
				return
			}
		}
	}
	if c.isLocal() && c.Unit != "" && !yield(Subject{kind: byUnit, name: c.Unit}) || !c.HasUser() {
		return
	}
	if !yield(Subject{kind: byUID, id: c.UID}) || !yield(Subject{kind: byGID, id: c.GID}) {
		return
	}
	for _, gid := range c.Groups {
		if !yield(Subject{kind: byGID, id: gid}) {
			return
		}
	}
}
