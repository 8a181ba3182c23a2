package agent

import "container/list"

// recent is a map that forgets what was used least recently once it is full. The zero value holds nothing;
// its owner locks.
type recent[K comparable, V any] struct {
	most  int // entries at once
	order list.List
	at    map[K]*list.Element
}

type remembered[K comparable, V any] struct {
	key   K
	value V
}

// use returns the value of key, and whether it was there; if not, it now is, and zero.
func (r *recent[K, V]) use(key K) (value *V, known bool) {
	if e := r.at[key]; e != nil {
		r.order.MoveToFront(e)
		return &e.Value.(*remembered[K, V]).value, true
	}
	if r.at == nil {
		r.at = make(map[K]*list.Element)
	}
	if len(r.at) >= r.most {
		r.remove(r.order.Back().Value.(*remembered[K, V]).key)
	}
	m := &remembered[K, V]{key: key}
	r.at[key] = r.order.PushFront(m)
	return &m.value, false
}

func (r *recent[K, V]) remove(key K) {
	if e := r.at[key]; e != nil {
		r.order.Remove(e)
		delete(r.at, key)
	}
}
