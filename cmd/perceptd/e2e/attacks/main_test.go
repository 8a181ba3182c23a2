//go:build attacks

package attacks

import (
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// must is said too often for a long name.
var must = harness.Must

func TestMain(m *testing.M) { harness.Main(m) }
