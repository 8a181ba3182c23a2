package agent

import "container/list"

// lru is a map that evicts its least recently used entry when it is full. The zero value is empty. It does no locking.
type lru[K comparable, V any] struct {
	size    int // entries at most
	order   list.List
	entries map[K]*list.Element
}

type lruEntry[K comparable, V any] struct {
	key   K
	value V
}

// use returns the value of key and whether there was one; if not, it adds a zero value.
func (l *lru[K, V]) use(key K) (value *V, known bool) {
	if e := l.entries[key]; e != nil {
		l.order.MoveToFront(e)
		return &e.Value.(*lruEntry[K, V]).value, true
	}
	if l.entries == nil {
		l.entries = make(map[K]*list.Element)
	}
	if len(l.entries) >= l.size {
		l.remove(l.order.Back().Value.(*lruEntry[K, V]).key)
	}
	entry := &lruEntry[K, V]{key: key}
	l.entries[key] = l.order.PushFront(entry)
	return &entry.value, false
}

func (l *lru[K, V]) remove(key K) {
	if e := l.entries[key]; e != nil {
		l.order.Remove(e)
		delete(l.entries, key)
	}
}
