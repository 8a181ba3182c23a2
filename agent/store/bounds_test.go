package store

import "perceptd/tokencache"

// The bounds of what is kept, which are tokencache's own.
const (
	maxID       = tokencache.MaxID
	maxResource = tokencache.MaxResource
	maxNote     = tokencache.MaxNote
	maxBygones  = 2 * tokencache.MaxKeys
	maxSelector = 1024
	maxText     = 64 << 10
	maxClaim    = 1024
	maxListed   = 2048
	maxDetail   = 512
	maxFormer   = 8
	maxOwn      = 8
	maxHistory  = 512

	maxGeneration = 1 << 62
)
