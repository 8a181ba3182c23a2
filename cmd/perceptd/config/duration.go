package config

import (
	"fmt"
	"strconv"
	"time"
)

// noSpread is what stands for no spread at all where zero stands for the default.
const noSpread = time.Nanosecond

// setDuration sets *to to the value of a key, unless the key is not there. A duration is a string in TOML,
// whose numbers have no unit.
func setDuration(to *time.Duration, value any, key string, where *positions) error {
	if value == nil {
		return nil
	}
	text, isText := value.(string)
	parsed, err := time.ParseDuration(text)
	if err == nil {
		*to = parsed
		return nil
	}
	if isText {
		value = strconv.Quote(text)
	}
	return fmt.Errorf(`%s: %s is %v: write a duration in quotes, such as "50m" or "1h30m"`, where.value(key), key,
		value)
}
