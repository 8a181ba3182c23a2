// Package attacks has real users attack a perceptd that has its unit's limits (make test-attacks).
package attacks
