package iothub

import (
	"encoding/json"

	"perceptd/agent/api"
)

// shortenable is a list of an answer. What is at its end is left out first.
type shortenable struct {
	name  string
	sizes []int // of each entry's JSON, with a comma
	keep  func(n int)
}

// listOf makes a list of an answer shortenable. name is what LeftOut calls it.
func listOf[T any](name string, list *[]T) shortenable {
	s := shortenable{name: name, keep: func(n int) { *list = (*list)[:n] }}
	for _, entry := range *list {
		s.sizes = append(s.sizes, sizeOf(entry)+1)
	}
	return s
}

// sizeOf returns how long v is as JSON. v is of ours, for which encoding cannot fail.
func sizeOf(v any) int {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return len(text)
}

// leftOutRoom is what the counts of what is left out take at most.
const leftOutRoom = 1 << 10

// fit shortens the lists of an answer that is size bytes long until it has room within limit, always the longest one,
// and counts what it left out; nil: nothing.
func fit(size, limit int, lists ...shortenable) api.LeftOut {
	if size <= limit {
		return nil
	}
	bytes, kept := make([]int, len(lists)), make([]int, len(lists))
	for i, list := range lists {
		kept[i] = len(list.sizes)
		for _, n := range list.sizes {
			bytes[i] += n
		}
	}
	for size > limit-leftOutRoom {
		longest := 0
		for i := range lists {
			if bytes[i] > bytes[longest] {
				longest = i
			}
		}
		if kept[longest] == 0 {
			break // all are empty
		}
		kept[longest]--
		size -= lists[longest].sizes[kept[longest]]
		bytes[longest] -= lists[longest].sizes[kept[longest]]
	}
	left := make(api.LeftOut)
	for i, list := range lists {
		if n := len(list.sizes) - kept[i]; n > 0 {
			list.keep(kept[i])
			left[list.name] = n
		}
	}
	return left
}
