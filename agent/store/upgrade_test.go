package store

import (
	"strings"
	"testing"
	"time"
)

// Up to version 2 a change that was noted by a clock which nobody vouched for had its boot time. In that boot it is the
// moment of the change, since on-time begins with it; in any other nothing tells the moment.
func TestMomentOfARecordWithoutOnTime(t *testing.T) {
	t.Parallel()
	const here = "5b0c7a52-1d1c-4d3b-8a55-0f5a6f4a0001"
	for _, row := range []struct {
		name, boot, id string
		at             string
		moment         time.Duration
	}{
		{"in the same boot", here, here, "5000", 5000},
		{"at the beginning of the boot", here, here, "0", 1},
		{"in another boot", "another", here, "5000", 0},
		{"in a boot that is not known", "", "", "5000", 0},
	} {
		for _, version := range []string{"1", "2"} {
			text := strings.NewReplacer(`"version":1`, `"version":`+version, `"boot_id":"b"`,
				`"boot_id":"`+row.boot+`"`, `"at_boot_ns":5`, `"at_boot_ns":`+row.at).
				Replace(entry("", ""))
			r, err := (&PolicyChanges{id: row.id}).decode([]byte(text))
			if err != nil {
				t.Fatal(err)
			}
			if p := r.Changes[0]; p.Moment != row.moment || p.By != row.moment || p.Vouched {
				t.Errorf("%s, version %s: %v to %v, vouched %v; want %v", row.name, version, p.Moment, p.By, p.Vouched,
					row.moment)
			}
		}
	}
}
