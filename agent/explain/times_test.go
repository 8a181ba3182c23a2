package explain

import (
	"testing"
	"time"
)

func TestDuration(t *testing.T) {
	t.Parallel()
	tests := []struct {
		d    time.Duration
		want string
	}{
		{-time.Hour, "0s"},
		{0, "0s"},
		{999 * time.Millisecond, "0s"},
		{9 * time.Second, "9s"},
		{time.Minute, "1m"},
		{4*time.Minute + 12*time.Second, "4m 12s"},
		{time.Hour, "1h"},
		{time.Hour + 59*time.Second, "1h"},
		{11*time.Hour + 52*time.Minute + 59*time.Second, "11h 52m"},
		{24 * time.Hour, "1d"},
		{76 * time.Hour, "3d 4h"},
		{400 * 24 * time.Hour, "400d"},
	}
	for _, test := range tests {
		if got := Duration(test.d); got != test.want {
			t.Errorf("Duration(%v) = %q, want %q", test.d, got, test.want)
		}
	}
}
