package config

import (
	"fmt"
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// crowds are what a file of up to a megabyte may be full of.
var crowds = map[string]string{
	"keys of no table":   "k%d=1\n",
	"unknown tables":     "[x%d]\n",
	"alike tables":       "[[grants%d]]\n",
	"grants":             "[[grant]]\n",
	"modules":            "[[module]]\n",
	"named modules":      "[[module]]\nname=\"m%d\"\nx=1\n",
	"resources":          "[[resource]]\n",
	"identities":         "[[identity]]\nname=\"i%d\"\ndefault=true\n",
	"equal identities":   "[[identity]]\nname=\"i\"\n",
	"prefetching grants": "[[grant]]\nidentity=\"device\"\nprefetch=true\nresources=[\"a:%d\"]\ncaller.uid=%d\n",
}

// full is unit again and again, up to n times or size bytes. Each %d is which time it is.
func full(unit string, n, size int) string {
	var text strings.Builder
	for i := 0; i < n && text.Len() < size; i++ {
		text.WriteString(strings.ReplaceAll(unit, "%d", fmt.Sprint(i)))
	}
	return text.String()
}

// A file that is full of tables or values is a fault before it is read as TOML, and so is the file with which all
// together have too many.
func TestCrowdedFiles(t *testing.T) {
	t.Parallel()
	for name, unit := range crowds {
		r := Read(harness.WriteConfig(t, map[string]string{"config.toml": full(unit, maxFile, maxFile-200)}))
		if len(r.Faults) != 1 || !strings.Contains(r.Faults[0].Error(), "more than 10000 tables and values") {
			t.Errorf("%s: %v", name, r.Faults)
		}
	}
	for name, text := range map[string]string{
		"a list":  "x=[" + strings.Repeat("1,", maxValues) + "]",
		"a table": "x={" + full("k%d=1,", maxValues, maxFile) + "k=1}",
		"lists":   "x=[" + strings.Repeat("{a=[1]},", maxValues/3+1) + "]",
	} {
		if _, err := parse(File{"/c", []byte(text)}); err == nil || !strings.Contains(err.Error(), "more than") {
			t.Errorf("%s: %v", name, err)
		}
	}
	half := full("[[grant]]\n", maxValues/2+1, maxFile)
	path := harness.WriteConfig(t, map[string]string{
		"config.toml":     harness.GoodConfig,
		"config.d/1.toml": half, "config.d/2.toml": half, "config.d/3.toml": "# few\n",
	})
	if r := Read(path); len(r.Faults) != 1 || !strings.Contains(r.Faults[0].Error(), "config.d/2.toml: with it") {
		t.Errorf("all together: %v", r.Faults)
	}
}

// Of many faults the first are named, and the others counted.
func TestManyFaults(t *testing.T) {
	t.Parallel()
	for name, unit := range crowds {
		const n = 1000
		c := Reading{path: "/c", Files: []File{{"/c", []byte(full(unit, n, maxFile))}}}.Config()
		all := strings.Split(c.faults.err(true).Error(), "\n")
		if len(all) != maxNamed+1 || !strings.Contains(all[maxNamed], "further faults: mend these first") {
			t.Errorf("%s: %d faults are named", name, len(all))
		}
		if len(c.Idle) > maxNamed+1 {
			t.Errorf("%s: %d elements are named", name, len(c.Idle))
		}
	}
}
