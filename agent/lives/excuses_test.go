package lives

// excuse is why the daemon need not do what it should: it could not know, or cannot do more. docs/reliability.md has a
// line for each.
type excuse string

const (
	// A clock that the kernel vouches for is believed: what expires by it has expired, and what is dated by it is dated
	// so.
	lyingClock excuse = "the clock is wrong and vouched for"

	// Where the back end tells an expiry alone, only the device's clock tells the life left.
	ownClock excuse = "the back end counts no life, and the clock is wrong"

	// After a boot by a clock that nobody vouches for, nothing tells for how long the device was off: a token that may
	// be valid is served, and labelled.
	offTime excuse = "nobody knows for how long the device was off"

	// What was kept cannot be read now, and it is read again as soon as it can be: until then what is fetched is served
	// as uncertain.
	unreadNow excuse = "nothing of what was kept can be read now"

	// Of all that was kept nothing is left, or only what is older than the change.
	allGone excuse = "all that was kept of a policy change is gone"

	// What the back end says of a life is believed, the lower the sooner. What it says later has to be borne out.
	toldWrong excuse = "the back end told a life that was too short"

	// A date that is to come is none. Of a token that comes first when it has come to be past, nothing tells that it
	// was wrong.
	laterPast excuse = "a wrong date has come to be past"

	// Another principal's tokens may be older than those before, and are taken all the same.
	madeAnew excuse = "the identity was made anew"

	// Of a full record a change goes that every token meets which the daemon has had. One that it has not had yet may
	// be from before.
	fullRecord excuse = "the record was full"

	// What one replica holds tells nothing of the others: another may hand out a token from before for longer.
	replicasDisagree excuse = "the back end's replicas disagree"

	// The back end gives nothing, or gave nothing just now: the pauses between calls are told in the guide.
	backEndFails excuse = "the back end fails"

	// Two calls at once and five a second are all that a back end gets. Who waits for more of them is told so after 10
	// seconds.
	callsAtOnce excuse = "the calls that may be made at once are taken"
)

// excuse counts how often that was an excuse.
func (o *oracle) excuse(e excuse) bool {
	o.excused[e]++
	return true
}
