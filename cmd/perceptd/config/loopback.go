package config

import (
	"fmt"
	"net/netip"
)

// Loopback says where tokens are served over TCP. Zero: nowhere.
type Loopback struct {
	Address netip.AddrPort

	text *string // as it was written last; nil: not at all
}

// take reads a [loopback].
func (c *Loopback) take(t *table) {
	if address, ok := t.text("address", exampleLoopback); ok {
		c.text = &address
	}
	t.finish()
}

// validate looks at what all files together say; there tells that one of them has a [loopback]. key is what is wrong.
func (c *Loopback) validate(there bool) (key string, err error) {
	switch {
	case c.text == nil && there:
		return "loopback", fmt.Errorf("[loopback] has no address: write address = %q, or take [loopback] out",
			exampleLoopback)
	case c.text == nil:
		return "", nil
	}
	c.Address, err = netip.ParseAddrPort(*c.text)
	ip := c.Address.Addr()
	if err != nil || c.Address.Port() == 0 || ip != netip.AddrFrom4([4]byte{127, 0, 0, 1}) &&
		ip != netip.IPv6Loopback() {
		return "loopback.address", fmt.Errorf(
			"loopback.address is %q: it must be 127.0.0.1 or [::1], a colon, and a port from 1 to 65535, such as %q",
			*c.text, exampleLoopback)
	}
	return "", nil
}

const exampleLoopback = "127.0.0.1:40380"
