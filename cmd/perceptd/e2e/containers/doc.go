// Package containers tests perceptd beside a real Docker and a real Podman (make test-containers).
package containers
