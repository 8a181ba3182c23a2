package main

import (
	"fmt"
	"time"
)

// span tells a duration in the two largest units that matter: "3d 4h", "11h 52m", "4m 12s", "9s".
func span(d time.Duration) string {
	seconds := int64(max(d, 0) / time.Second)
	units := []struct {
		name    string
		seconds int64
	}{{"d", 86400}, {"h", 3600}, {"m", 60}, {"s", 1}}
	for i, unit := range units {
		if seconds < unit.seconds || i == len(units)-1 {
			continue
		}
		text := fmt.Sprintf("%d%s", seconds/unit.seconds, unit.name)
		smaller := units[i+1]
		if rest := seconds % unit.seconds / smaller.seconds; rest > 0 {
			text += fmt.Sprintf(" %d%s", rest, smaller.name)
		}
		return text
	}
	return fmt.Sprintf("%ds", seconds)
}

// seconds turns the wire's seconds into a duration.
func seconds(n int64) time.Duration { return time.Duration(n) * time.Second }
