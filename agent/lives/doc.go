// Package lives has nothing but a test: it lives whole lives of devices, with the real cache, agent, record and saver,
// on clocks and disks of its own, and looks after each step whether what callers got was right.
//
// Everything that happens in a life is drawn at once from a seed: a plan. The plan is lived in a bubble of virtual
// time, so that a seed is the same history on any machine. An oracle knows the truth (when each token was issued, and
// which policy changes it lacks) and what the daemon could know. A life that goes wrong is lived again and again with
// less in its plan, until nothing can be left out; what is left is printed.
package lives
