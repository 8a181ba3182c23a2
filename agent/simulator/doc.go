// Package simulator is a managed-identity back end for demonstrations and tests. It opens nothing.
//
// A Backend is the model: identities with their permissions, and the cache that makes the real
// service hand out one token per identity and resource for around 24 hours, whatever changes
// meanwhile. Start puts it on a loopback port, where it answers as Azure's instance metadata
// service, as App Service or as the Azure Arc agent does, so that unmodified clients talk to it, and
// where it fails on request in the ways of [FaultKind].
//
// Nothing it gives out can be taken for real. A token's algorithm is "none", its signature decodes
// to "simulated", its issuer ends in ".invalid", and the claims "simulated" and "warning" say the
// same in words; every answer names the simulation in its Server header; and Start refuses any
// address but loopback. It accepts whatever caller reaches that port, so whoever starts it
// must not put real permissions behind it, and must close the Server.
package simulator
