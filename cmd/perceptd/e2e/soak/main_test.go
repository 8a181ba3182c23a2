//go:build soak

package soak

import (
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }
