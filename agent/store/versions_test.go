package store

import (
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"testing"

	"perceptd/tokencache"
)

// golden reads a document in testdata. The releases of perceptd that had version 1, 2 and 3 wrote those with a number
// alone; what the release that began with version 3 read in the two before is beside them, as it wrote that.
func golden(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// What each version before wrote means the same as it did, and what is written now is what version 3 has always been.
func TestEachVersionIsRead(t *testing.T) {
	t.Parallel()
	r := &PolicyChanges{id: "golden-boot"}
	want := all()
	want.BootID = r.id
	for name, text := range map[string][]byte{"snapshot-3": encoded(encodeSnapshot(whole(1))),
		"policy-changes-3": encoded(r.encode(want))} {
		if !sameJSON(t, text, golden(t, name)) {
			t.Errorf("%s is written otherwise:\n%s", name, text)
		}
	}
	if m, err := decodeSnapshot(golden(t, "snapshot-3")); err != nil || !reflect.DeepEqual(*m, whole(1)) {
		t.Errorf("%v, %+v", err, m)
	}
	if record, err := r.decode(golden(t, "policy-changes-3")); err != nil || !reflect.DeepEqual(*record, want) {
		t.Errorf("%v, %+v", err, record)
	}
	for n := 1; n <= 2; n++ {
		name := fmt.Sprintf("snapshot-%d", n)
		m, err := decodeSnapshot(golden(t, name))
		if err != nil {
			t.Fatal(err)
		}
		if text := encoded(encodeSnapshot(*m)); !sameJSON(t, text, golden(t, name+"-read")) || len(m.Keys) != 3 ||
			m.Keys[0].Token.Text.Reveal() != canary {
			t.Errorf("%s means something else:\n%s", name, text)
		}
		name = fmt.Sprintf("policy-changes-%d", n)
		var record *tokencache.Record
		if record, err = r.decode(golden(t, name)); err != nil {
			t.Fatal(err)
		}
		if text := encoded(r.encode(*record)); !sameJSON(t, text, golden(t, name+"-read")) || len(record.Changes) != 5 {
			t.Errorf("%s means something else:\n%s", name, text)
		}
	}
}

// encoded is what was written, or nothing where it could not be.
func encoded(text []byte, err error) []byte {
	if err != nil {
		return nil
	}
	return text
}

func sameJSON(t *testing.T, a, b []byte) bool {
	t.Helper()
	var x, y any
	if err := json.Unmarshal(a, &x); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &y); err != nil {
		t.Fatal(err)
	}
	return reflect.DeepEqual(x, y)
}
