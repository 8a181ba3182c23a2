package config

// Idle is an element of the configuration that has a fault, and gives nothing while the rest is in force.
type Idle struct {
	Place   string // "FILE:LINE" of its first fault
	Element string // "grant 2", "[callers]"
	Why     string // every fault of it, in words
}
