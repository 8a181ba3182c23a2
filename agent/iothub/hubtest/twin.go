package hubtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"strings"
	"time"
)

// The documented limits of twins.
const (
	maxDepth   = 10
	maxString  = 4 << 10  // bytes of a value
	maxKey     = 1 << 10  // bytes
	maxSection = 32 << 10 // bytes of the desired, or of the reported properties
	maxTags    = 8 << 10
)

// twin is what the hub has of an identity.
type twin struct {
	desired, reported section
	tags              object
	etag              uint64
}

func newTwin(now time.Time) twin {
	return twin{desired: newSection(now), reported: newSection(now), tags: object{}, etag: 1}
}

type object = map[string]any

// section is the desired, or the reported properties.
type section struct {
	properties object
	metadata   object // when each was last set
	version    int64
	updated    time.Time
}

func newSection(now time.Time) section {
	return section{properties: object{}, metadata: object{}, version: 1, updated: now}
}

// readObject reads a JSON object. Numbers stay as they are written.
func readObject(text []byte) (object, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var o object
	if err := d.Decode(&o); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is something after the object")
	}
	if o == nil {
		return nil, errors.New("it is null, not an object")
	}
	return o, nil
}

// CheckReported returns what IoT Hub refuses in the whole of the reported properties, a JSON object, or nil.
func CheckReported(text []byte) error {
	properties, err := readObject(text)
	if err != nil {
		return err
	}
	if err := checkObject(properties, "properties", 1); err != nil {
		return err
	}
	return checkSize(properties, maxSection)
}

func checkObject(o object, path string, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%s is deeper than %d levels", path, maxDepth)
	}
	for key, value := range o {
		switch {
		case key == "" || len(key) > maxKey || strings.ContainsFunc(key, badInKey):
			return fmt.Errorf("%s has a key %q: a key has no '.', '$', blank or control character", path, key)
		case value == nil:
			continue // it deletes
		}
		if err := checkValue(value, path+"."+key, depth); err != nil {
			return err
		}
	}
	return nil
}

func badInKey(r rune) bool {
	return r == '.' || r == '$' || r == ' ' || r < 0x20 || r >= 0x7f && r <= 0x9f
}

var largest = new(big.Float).SetInt64(1 << 52)

func checkValue(value any, path string, depth int) error {
	switch v := value.(type) {
	case nil:
		return fmt.Errorf("%s is null within an array", path)
	case string:
		if len(v) > maxString {
			return fmt.Errorf("%s has more than %d bytes", path, maxString)
		}
	case json.Number:
		n, ok := new(big.Float).SetString(v.String())
		if !ok {
			return fmt.Errorf("%s is no number", path)
		}
		if n.IsInt() && n.Abs(n).Cmp(largest) > 0 {
			return fmt.Errorf("%s is beyond 2^52", path)
		}
	case object:
		return checkObject(v, path, depth+1)
	case []any:
		if depth+1 > maxDepth {
			return fmt.Errorf("%s is deeper than %d levels", path, maxDepth)
		}
		for n, element := range v {
			if err := checkValue(element, fmt.Sprintf("%s[%d]", path, n), depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkSize counts as the hub does: names and values, without the marks between them.
func checkSize(o object, most int) error {
	if size := sizeOf(o); size > most {
		return fmt.Errorf("the properties have %d bytes, more than %d", size, most)
	}
	return nil
}

func sizeOf(value any) int {
	switch v := value.(type) {
	case string:
		return len(v)
	case json.Number:
		return 8
	case bool:
		return 4
	case []any:
		size := 0
		for _, element := range v {
			size += sizeOf(element)
		}
		return size
	case object:
		size := 0
		for key, element := range v {
			size += len(key) + sizeOf(element)
		}
		return size
	}
	return 0
}

// hasArray reports whether there is an array in a value.
func hasArray(value any) bool {
	switch v := value.(type) {
	case []any:
		return true
	case object:
		for _, element := range v {
			if hasArray(element) {
				return true
			}
		}
	}
	return false
}

// arraysSince is the first version of the API that takes arrays.
const arraysSince = "2019-10-01"

// patch merges change, in which null deletes, or has it take the place of everything. Nothing changes on an error.
func (s *section) patch(change object, replace bool, apiVersion string, now time.Time) error {
	change = clone(change)
	delete(change, "$version")
	delete(change, "$metadata")
	if apiVersion < arraysSince && hasArray(change) {
		return fmt.Errorf("api-version %s takes no arrays", apiVersion)
	}
	if err := checkObject(change, "properties", 1); err != nil {
		return err
	}
	properties, metadata := object{}, object{}
	if !replace {
		properties, metadata = clone(s.properties), clone(s.metadata)
	}
	merge(properties, metadata, change, now.UTC().Format(timeFormat))
	if err := checkSize(properties, maxSection); err != nil {
		return err
	}
	s.properties, s.metadata, s.updated = properties, metadata, now
	s.version++
	return nil
}

// timeFormat is how the hub writes times.
const timeFormat = "2006-01-02T15:04:05.0000000Z"

func merge(properties, metadata, change object, now string) {
	for key, value := range change {
		if value == nil {
			delete(properties, key)
			delete(metadata, key)
			continue
		}
		of, _ := metadata[key].(object)
		within, isObject := value.(object)
		if of == nil || !isObject {
			of = object{}
			metadata[key] = of
		}
		of["$lastUpdated"] = now
		if !isObject {
			properties[key] = value
			continue
		}
		into, _ := properties[key].(object)
		if into == nil {
			into = object{}
			properties[key] = into
		}
		merge(into, of, within, now)
	}
}

// clone copies objects and arrays.
func clone(o object) object {
	copied := make(object, len(o))
	for key, value := range o {
		copied[key] = cloneValue(value)
	}
	return copied
}

func cloneValue(value any) any {
	switch v := value.(type) {
	case object:
		return clone(v)
	case []any:
		copied := slices.Clone(v)
		for n := range copied {
			copied[n] = cloneValue(copied[n])
		}
		return copied
	}
	return value
}

// setTags merges change into the tags, or has it take the place of all.
func (t *twin) setTags(change object, replace bool) error {
	if err := checkObject(change, "tags", 1); err != nil {
		return err
	}
	tags := object{}
	if !replace {
		tags = clone(t.tags)
	}
	merge(tags, object{}, change, "")
	if err := checkSize(tags, maxTags); err != nil {
		return err
	}
	t.tags = tags
	t.etag++
	return nil
}

// forDevice returns the section as devices get it.
func (s *section) forDevice() object {
	o := clone(s.properties)
	o["$version"] = s.version
	return o
}

// forService returns the section as the service's side gets it.
func (s *section) forService() object {
	o := s.forDevice()
	metadata := clone(s.metadata)
	metadata["$lastUpdated"] = s.updated.UTC().Format(timeFormat)
	o["$metadata"] = metadata
	return o
}
