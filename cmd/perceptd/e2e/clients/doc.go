// Package clients has Azure's own SDKs and command line ask a running perceptd (make test-clients).
package clients
