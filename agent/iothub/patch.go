package iothub

import "reflect"

// unknown stands for a value that the hub may or may not have taken.
type unknown struct{}

// mergePatch returns what makes want of has: a JSON merge patch (RFC 7396), in which null removes, and arrays take the
// place of arrays whole. Nil: nothing differs. Both are objects as encoding/json decodes them; has may have unknown
// values, which differ from everything.
func mergePatch(has, want map[string]any) map[string]any {
	patch := make(map[string]any)
	for name := range has {
		if _, wanted := want[name]; !wanted {
			patch[name] = nil
		}
	}
	for name, value := range want {
		held, there := has[name]
		inner, isObject := value.(map[string]any)
		within, wasObject := held.(map[string]any)
		switch {
		case isObject && wasObject:
			if change := mergePatch(within, inner); change != nil {
				patch[name] = change
			}
		case !there || !reflect.DeepEqual(held, value):
			patch[name] = value
		}
	}
	if len(patch) == 0 {
		return nil
	}
	return patch
}

// merged returns what a merge patch makes of has, which it leaves as it is.
func merged(has, patch map[string]any) map[string]any {
	result := make(map[string]any, len(has))
	for name, value := range has {
		result[name] = value
	}
	for name, value := range patch {
		switch inner, isObject := value.(map[string]any); {
		case value == nil:
			delete(result, name)
		case isObject:
			within, _ := has[name].(map[string]any)
			result[name] = merged(within, inner)
		default:
			result[name] = value
		}
	}
	return result
}

// doubted returns has where it is not known whether a merge patch was taken.
func doubted(has, patch map[string]any) map[string]any {
	result := make(map[string]any, len(has))
	for name, value := range has {
		result[name] = value
	}
	for name, value := range patch {
		if inner, isObject := value.(map[string]any); isObject {
			within, _ := has[name].(map[string]any)
			result[name] = doubted(within, inner)
		} else {
			result[name] = unknown{}
		}
	}
	return result
}
