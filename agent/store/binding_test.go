package store

import (
	"bytes"
	"os"
	"reflect"
	"strings"
	"testing"

	"perceptd/agent/binding"
)

// knownBy opens the tokens in dir on a device that is known by that, the best first.
func knownBy(t *testing.T, dir string, known ...binding.Binding) *Tokens {
	t.Helper()
	tokens, err := OpenTokens(folderAt(t, dir), testKey, known...)
	if err != nil {
		t.Fatal(err)
	}
	return tokens
}

var (
	product = binding.Binding{Kind: binding.ProductUUID, ID: [32]byte{1}}
	serial  = binding.Binding{Kind: binding.Serial, ID: [32]byte{1}}
	machine = binding.Binding{Kind: binding.MachineID, ID: [32]byte{2}}
)

// State and key on another device open no tokens there, and leave the policy changes in force.
func TestTokensAreBoundToTheDevice(t *testing.T) {
	t.Parallel()
	another := binding.Binding{Kind: binding.ProductUUID, ID: [32]byte{9}}
	for name, row := range map[string]struct {
		sealed, opened []binding.Binding
		opens          bool
		says           string
	}{
		"the same": {[]binding.Binding{product, machine}, []binding.Binding{product, machine},
			true, ""},
		"nothing, both times": {nil, nil, true, ""},
		"another device": {[]binding.Binding{product}, []binding.Binding{another}, false,
			"on another device"},
		"another, the same disk": {[]binding.Binding{product, machine}, []binding.Binding{another, machine},
			false, "on another device"},
		"the same value of another kind": {[]binding.Binding{product}, []binding.Binding{serial}, false,
			"bound to its device's product UUID"},
		"one that is known by nothing": {[]binding.Binding{product}, nil, false,
			"bound to its device's product UUID"},
		"by more than before":            {[]binding.Binding{machine}, []binding.Binding{product, machine}, true, ""},
		"by something, and nothing then": {nil, []binding.Binding{product}, true, ""},
		"by less, of which one is known": {[]binding.Binding{serial, machine}, []binding.Binding{serial}, true, ""},
		"another installation": {[]binding.Binding{machine},
			[]binding.Binding{{Kind: binding.MachineID, ID: [32]byte{3}}}, false, "on another device"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := knownBy(t, dir, row.sealed...).Save(small()); err != nil {
				t.Fatal(err)
			}
			record := open(t, dir)
			if err := record.Save(all()); err != nil {
				t.Fatal(err)
			}
			m, err := knownBy(t, dir, row.opened...).Load()
			switch {
			case row.opens && (err != nil || !reflect.DeepEqual(*m, small())):
				t.Errorf("%v, %v", m, err)
			case !row.opens && (m != nil || err == nil || !strings.Contains(err.Error(), row.says) ||
				strings.Contains(err.Error(), "moved aside when others are saved") == strings.Contains(err.Error(),
					"it stays")):
				t.Errorf("%v, %v", m, err)
			}
			if kept, err := record.Load(); err != nil || len(kept.Changes) != len(all().Changes) {
				t.Errorf("the policy changes: %v, %v", kept, err)
			}
			if !row.opens {
				return
			}
			// From now on it is bound to the best.
			text, err := os.ReadFile(tokensFile(knownBy(t, dir)))
			if want := headOf(binding.Best(row.opened)); err != nil || !bytes.HasPrefix(text, []byte(want)) {
				t.Errorf("it begins with %.17q, %v, want %q", text, err, want)
			}
			if m, err := knownBy(t, dir, row.opened...).Load(); err != nil || !reflect.DeepEqual(*m, small()) {
				t.Errorf("again: %v, %v", m, err)
			}
		})
	}
}

// A file of the version before, which was sealed with the key itself, opens once, and is bound from then on.
func TestTokensOfTheVersionBefore(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	tokens := knownBy(t, dir, product)
	former := &Tokens{folder: tokens.folder, head: formerHead, seal: tokens.seal}
	if err := former.Save(small()); err != nil {
		t.Fatal(err)
	}
	if m, err := tokens.Load(); err != nil || !reflect.DeepEqual(*m, small()) {
		t.Fatalf("%v, %v", m, err)
	}
	if m, err := knownBy(t, dir, serial).Load(); m != nil || err == nil {
		t.Errorf("it was not sealed anew: %v", m)
	}
}
