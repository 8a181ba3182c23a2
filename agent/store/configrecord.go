package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

const (
	configRecordName = "config-in-force.json"
	maxConfigRecord  = 1 << 20
)

// ConfigRecord says which configuration was put in force last. It is saved before a reload answers, so that a copy of
// the configuration from before is never taken for it.
type ConfigRecord struct {
	SHA256 string    `json:"sha256"`         // of its files: config.Sum
	Files  []string  `json:"files"`          // their paths, in the order in which they are read
	Since  time.Time `json:"since"`          // when it was put in force
	Gone   []string  `json:"gone,omitempty"` // those of Files that were taken away since, and do not go on
}

// LoadConfigRecord returns the record in folder; nil: there is none. An error beside a record says that other users
// could have changed it (*LooseError).
func LoadConfigRecord(folder Folder) (*ConfigRecord, error) {
	text, err := folder.Read(configRecordName, othersMayChange, maxConfigRecord)
	if err != nil && !isLoose(err) {
		return nil, err
	}
	var r ConfigRecord
	if wrong := json.Unmarshal(text, &r); wrong != nil {
		return nil, &SpoiltError{Name: configRecordName, Why: wrong}
	}
	if r.SHA256 == "" {
		return nil, &SpoiltError{Name: configRecordName, Why: errors.New("it has no sha256")}
	}
	return &r, err
}

// Save puts r in the place of the record in folder. Where that fails, no record is left if that can be had: then no
// copy goes on, and none from before r either.
func (r ConfigRecord) Save(folder Folder) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	err = folder.Replace(configRecordName, append(text, '\n'))
	if err == nil {
		return nil
	}
	if stays := folder.Remove(configRecordName); stays != nil {
		return fmt.Errorf("%w; the record from before stays: %w", err, stays)
	}
	return err
}
