package simulator

import (
	"fmt"
	"slices"
	"time"
)

// maxFaults bounds how many are in force at once.
const maxFaults = 256

// faultSet is the faults in force, in the order in which they were added. The Backend's lock protects it.
type faultSet struct {
	active   []*ActiveFault
	drawn    uint64        // odds drawn so far
	released chan struct{} // closed when the faults are cleared; nil until one strikes
}

// ActiveFault is a fault in force and what became of it.
type ActiveFault struct {
	Fault
	Struck int       // requests so far
	Until  time.Time // by the back end's clock; zero without an end
}

// struck is a fault that hit a request. The zero value is none.
type struck struct {
	Fault
	released <-chan struct{} // closed when the faults are cleared
}

// AddFault puts a fault in force, or says what is wrong with it.
func (b *Backend) AddFault(f Fault) error {
	f, err := f.check()
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	b.faults.dropEnded(now)
	if len(b.faults.active) == maxFaults {
		return fmt.Errorf("%d faults are in force already", maxFaults)
	}
	a := &ActiveFault{Fault: f}
	if f.For > 0 {
		a.Until = now.Add(f.For)
	}
	b.faults.active = append(b.faults.active, a)
	return nil
}

// ClearFaults ends every fault; requests that hang are answered.
func (b *Backend) ClearFaults() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.faults.active = nil
	if b.faults.released != nil {
		close(b.faults.released)
		b.faults.released = nil
	}
}

// Faults returns those in force, in the order in which they were added.
func (b *Backend) Faults() []ActiveFault {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.faults.dropEnded(b.now())
	var all []ActiveFault
	for _, a := range b.faults.active {
		all = append(all, *a)
	}
	return all
}

// strike returns the fault that hits a request for resource, on Arc's first leg or on any other.
func (b *Backend) strike(resource string, challenge bool) struck {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := &b.faults
	s.dropEnded(b.now())
	for _, a := range s.active {
		if a.Resource != "" && a.Resource != resource || (a.Challenge || a.Kind.onChallenge()) != challenge {
			continue
		}
		s.drawn++
		if b.roll("fault", s.drawn) >= a.Probability {
			continue
		}
		a.Struck++
		if s.released == nil {
			s.released = make(chan struct{})
		}
		return struck{a.Fault, s.released}
	}
	return struck{}
}

func (s *faultSet) dropEnded(now time.Time) {
	s.active = slices.DeleteFunc(s.active, func(a *ActiveFault) bool {
		return a.Count > 0 && a.Struck >= a.Count || !a.Until.IsZero() && !now.Before(a.Until)
	})
}
