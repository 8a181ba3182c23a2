package main

import (
	"errors"
	"fmt"
	"os/user"
	"strconv"

	"perceptd/agent/client"
)

// callerQuery is a caller, and what it would ask for.
type callerQuery struct {
	caller             client.Subject
	user               string // name or number
	groups             []string
	resource, identity string
}

// resolve turns the names of a user and a group into their numbers, which is what the kernel knows.
func (c *callerQuery) resolve() error {
	var faults []error
	if c.user != "" {
		uid, err := idOf(c.user, func(name string) (string, error) {
			account, err := user.Lookup(name)
			if err != nil {
				return "", fmt.Errorf("user %q is not known on this device", name)
			}
			if len(c.groups) == 0 {
				c.groups = groupsOf(account)
			}
			return account.Uid, nil
		})
		c.caller.UID = &uid
		faults = append(faults, err)
	}
	for i, name := range c.groups {
		gid, err := idOf(name, func(name string) (string, error) {
			group, err := user.LookupGroup(name)
			if err != nil {
				return "", fmt.Errorf("group %q is not known on this device", name)
			}
			return group.Gid, nil
		})
		if i == 0 {
			c.caller.GID = &gid
		} else {
			c.caller.Groups = append(c.caller.Groups, gid)
		}
		faults = append(faults, err)
	}
	return errors.Join(faults...)
}

// groupsOf lists the numbers of the groups that processes of an account have, its own first.
func groupsOf(account *user.User) []string {
	all := []string{account.Gid}
	others, _ := account.GroupIds() // then its own is all that is known
	for _, gid := range others {
		if gid != account.Gid {
			all = append(all, gid)
		}
	}
	return all
}

// idOf returns text as a number, or the number of what is named so.
func idOf(text string, lookUp func(string) (string, error)) (uint32, error) {
	if n, err := strconv.ParseUint(text, 10, 32); err == nil {
		return uint32(n), nil
	}
	found, err := lookUp(text)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(found, 10, 32)
	return uint32(n), err
}
