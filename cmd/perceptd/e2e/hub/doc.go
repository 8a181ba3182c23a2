// Package hub has Microsoft's own SDKs judge the hub for tests, agent/iothub/hubtest, and call a running perceptd
// through it (make test-hub).
package hub
