package staleness

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent/simulator"
	"perceptd/tokencache"
)

// What perceptd tells a module's SDK of a token's life, and how an SDK with azidentity inside uses it.
const (
	toldCurrent = 35 * time.Minute
	toldStale   = 25 * time.Minute
	sdkMargin   = 5 * time.Minute

	sdkTries = 4 // where a request is answered with 503 and Retry-After: 2
	sdkPause = 2 * time.Second

	sdkPatience = (sdkTries - 1) * sdkPause
)

// sdk is what SDKs need of a token.
var sdk = tokencache.Need{MinTTL: 5 * time.Minute}

// devices are perceptd's at work on the keys of a world, and the modules that use them.
type devices struct {
	world
	mu    sync.Mutex // protects lives
	lives []*life

	caches  []*tokencache.Cache // by key; one for all, or one each
	running sync.WaitGroup
}

// perceptd runs the cache for each key's modules through the whole time: one device that has them all, or,
// with alone, a device for each.
func perceptd(t *testing.T, w world, alone bool) []*life {
	t.Helper()
	d := &devices{world: w, caches: make([]*tokencache.Cache, w.keys)}
	synctest.Test(t, func(t *testing.T) {
		for key := range w.keys {
			d.lives = append(d.lives, w.live(key, time.Now))
		}
		for key := range d.caches {
			if key == 0 || alone {
				d.caches[key] = d.cache(int64(key))
			} else {
				d.caches[key] = d.caches[0]
			}
		}
		ctx, cancel := context.WithDeadline(t.Context(), w.span().to)
		defer cancel()
		for key := range w.keys {
			d.running.Go(func() { d.administer(ctx, t, key) })
			d.running.Go(func() { d.module(ctx, key) })
		}
		d.running.Wait()
		for key, c := range d.caches {
			if key == 0 || alone {
				c.Close()
			}
		}
	})
	return d.lives
}

// cache returns a cache whose rolls follow from the moment: the order of what happens at one moment is not
// defined, and must not matter.
func (d *devices) cache(n int64) *tokencache.Cache {
	return tokencache.New(tokencache.Options{
		Fetch:   d.fetch,
		Roll:    func() float64 { return d.roll(forSchedule, n, time.Now().UnixNano()) },
		Observe: d.observe,
	})
}

func keyOf(n int) tokencache.Key {
	return tokencache.Key{Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: strconv.Itoa(n)},
		Resource: vault}
}

func (d *devices) life(key tokencache.Key) *life {
	n, err := strconv.Atoi(key.Selector.ID)
	if err != nil {
		panic(err)
	}
	return d.lives[n]
}

// fetch is the caches' source. A call takes a moment.
func (d *devices) fetch(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	d.mu.Lock()
	l := d.life(key)
	takes := 50*time.Millisecond + time.Duration(d.roll(forLatency, int64(l.key),
		int64(l.asked))*float64(200*time.Millisecond))
	d.mu.Unlock()
	time.Sleep(takes)
	d.mu.Lock()
	defer d.mu.Unlock()
	m, ok := l.ask()
	switch {
	case !ok && l.outage.holds(l.now()):
		return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Unreachable, Extent: tokencache.OfSource,
			Detail: "connection refused"}
	case !ok:
		return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "status 500"}
	}
	return fetchedOf(m, m.ExpiresOn.Sub(l.now().Add(l.ahead()))), nil
}

func fetchedOf(m simulator.Token, left time.Duration) tokencache.Fetched {
	return tokencache.Fetched{Left: left, Token: tokencache.Token{
		Text: tokencache.NewSecret(m.Text), ExpiresOn: m.ExpiresOn, NotBefore: m.NotBefore,
		Claims: tokencache.Claims{IssuedAt: m.IssuedAt, NotBefore: m.NotBefore, Groups: m.Permissions.Groups},
	}}
}

// observe notes what came into perceptd's hand.
func (d *devices) observe(e tokencache.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.life(e.Key)
	if e.Outcome == tokencache.Newer {
		l.hold(l.given)
	}
	if e.Outcome != tokencache.Failed {
		l.label(l.given.Permissions.Groups, e.Permissions)
		if l.current && e.Permissions.State != tokencache.Current {
			l.doubted++
		}
	}
}

// administer makes the policy changes of a key and tells perceptd of each at its moment.
func (d *devices) administer(ctx context.Context, t *testing.T, key int) {
	l := d.lives[key]
	for i, change := range d.changes(key) {
		if !sleepUntil(ctx, change.made) {
			return
		}
		notice := tokencache.PolicyChange{
			ID: fmt.Sprintf("%d/%d", key, i), Selector: keyOf(key).Selector, Resource: vault, At: time.Now(),
			Effect: tokencache.Changed,
		}
		if _, err := d.caches[key].RecordChange(notice); err != nil {
			t.Errorf("the notice of a policy change: %v", err)
		}
		d.mu.Lock()
		l.change(change)
		d.mu.Unlock()
		if !sleepUntil(ctx, change.reached) {
			return
		}
		d.mu.Lock()
		if err := l.reach(); err != nil {
			t.Error(err)
		}
		d.mu.Unlock()
	}
}

// module uses a token every minute, through an SDK that asks perceptd when less than five minutes are left
// of the life that it was told.
func (d *devices) module(ctx context.Context, key int) {
	l := d.lives[key]
	for use := d.nextUse(key, opened); sleepUntil(ctx, use); {
		answer, ok := d.request(ctx, key)
		told := time.Now() // until then it may use the token it has
		d.mu.Lock()
		switch {
		case ok:
			groups := answer.Token.Claims.Groups
			l.label(groups, answer.Permissions)
			l.inModule(groups)
			told = told.Add(min(answer.Left, advertised(answer.Permissions)))
		case ctx.Err() == nil:
			l.fail(use)
		}
		d.mu.Unlock()
		use = d.nextUse(key, latest(time.Now(), told.Add(-sdkMargin)).Add(1))
	}
}

func advertised(p tokencache.Permissions) time.Duration {
	if p.State == tokencache.Current {
		return toldCurrent
	}
	return toldStale
}

// request asks perceptd as an SDK does. Those that were turned away together come again in the order of their keys.
func (d *devices) request(ctx context.Context, key int) (tokencache.Answer, bool) {
	for try := range sdkTries {
		if try > 0 && !sleepUntil(ctx, time.Now().Add(sdkPause+time.Duration(key)*time.Microsecond)) {
			break
		}
		if answer, err := d.caches[key].Get(ctx, keyOf(key), sdk); err == nil {
			return answer, true
		}
	}
	return tokencache.Answer{}, false
}

// sleepUntil reports whether t came before ctx ended.
func sleepUntil(ctx context.Context, t time.Time) bool {
	timer := time.NewTimer(time.Until(t))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
