package source

import (
	"slices"
	"sync"

	"go.uber.org/zap"
)

// ignored tells the log of fields that endpoints fill with nonsense and that a token can do without: once of each name,
// which bounds it, and never of what was in them.
type ignored struct {
	log *zap.Logger

	mu   sync.Mutex // protects told
	told []string
}

func (i *ignored) note(fields []string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, name := range fields {
		if !slices.Contains(i.told, name) {
			i.told = append(i.told, name)
			i.log.Warn("a field of the back end's answer makes no sense and is ignored; the token is used, and this is not told again",
				zap.String("field", name))
		}
	}
}
