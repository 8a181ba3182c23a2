//go:build bench

package bench

import (
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }
