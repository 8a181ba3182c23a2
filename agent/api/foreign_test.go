package api

import (
	"net/http"
	"strings"
	"testing"
)

func TestForeignHeader(t *testing.T) {
	t.Parallel()
	for name := range foreign {
		if canonical := http.CanonicalHeaderKey(name); canonical != name { // as which net/http has it
			t.Errorf("%s is written %s", name, canonical)
		}
	}
	for _, row := range []struct {
		header    map[string][]string
		name, why string
	}{
		{nil, "", ""},
		{http.Header{"Accept": {"*/*"}, "Sec-Fetch-Mode": {"cors"}, "X-Identity-Header": {"x"}, "Metadata": {"true"},
			"X-Forwarded": {"x"}}, "", ""},
		{http.Header{"Via": nil}, "Via", "through a proxy"},
		{http.Header{"X-Real-Ip": {""}, "Accept": {"*/*"}}, "X-Real-Ip", "through a proxy"},
		{http.Header{"X-Forwarded-Whatever": {"x"}}, "X-Forwarded-Whatever", "through a proxy"},
		{http.Header{"Sec-Fetch-Site": {"none"}, "Referer": {"x"}, "Via": {"x"}}, "Referer", "pages in a browser"},
	} {
		if name, why := ForeignHeader(row.header); name != row.name || !strings.Contains(why, row.why) {
			t.Errorf("%v: %q, %q", row.header, name, why)
		}
	}
}
