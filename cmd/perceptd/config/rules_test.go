package config

import (
	"slices"
	"strings"
	"testing"
	"time"

	"perceptd/cmd/perceptd/e2e/harness"
)

const blobURI = "https://account.blob.core.windows.net"

func TestSpreadAndResources(t *testing.T) {
	t.Parallel()
	path := harness.WriteConfig(t, map[string]string{
		"config.toml": strings.Replace(harness.GoodConfig, "[source]\n", "[source]\nspread = \"8m\"\n", 1) +
			"\n[tokens]\nspread = \"5m\"\n[[resource]]\nuri = \"https://vault.azure.net\"\nalternates = [\"" +
			blobURI + "\"]\n",
		"config.d/a.toml": "[tokens]\nspread = \"0s\"\n[[resource]]\nuri = \"api://x\"\nalternates = [\"api://y\", " +
			"\"api://z\"]\n[[grant]]\ncaller = { module = \"vision\" }\nidentity = \"vision\"\nresources = " +
			"[\"api://x\", \"api://y\"]\n",
	})
	c, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if c.Source.Spread != 8*time.Minute || c.Rules.Spread != noSpread || len(c.Rules.Alternates) != 2 ||
		!slices.Equal(c.Rules.Alternates["api://x"], []string{"api://y", "api://z"}) {
		t.Errorf("%+v", c)
	}
	for _, line := range []string{
		"resource: api://x accepts tokens for api://y, api://z too\n",
		"resource: https://vault.azure.net accepts tokens for " + blobURI + " too\n",
		"warning: api://z will never stand in for api://x: no caller's grants name both with the same identity\n",
		"warning: " + blobURI + " will never stand in for https://vault.azure.net: no caller's",
		"a policy change takes up to 0s to reach new tokens\n",
	} {
		if !strings.Contains(c.Describe(), line) {
			t.Errorf("%q is missing in\n%s", line, c.Describe())
		}
	}
	if strings.Contains(c.Describe(), "warning: api://y") {
		t.Errorf("a warning of what will be served:\n%s", c.Describe())
	}
}

func TestSpreadAndResourceFaults(t *testing.T) {
	t.Parallel()
	resource := func(text string) string { return harness.GoodConfig + "\n[[resource]]\n" + text }
	alternates := "alternates = [\"api://y\"]\n"
	for _, row := range []struct{ name, text, want string }{
		{"no duration", harness.GoodConfig + "\n[tokens]\nspread = 10\n",
			`config.toml:19: tokens.spread is 10: write a duration in quotes`},
		{"a negative one", harness.GoodConfig + "\n[tokens]\nspread = \"-1s\"\n",
			"config.toml:19: spread is -1s: it must be between 0s and 24h0m0s"},
		{"a long one", harness.GoodConfig + "\n[tokens]\nspread = \"25h\"\n",
			"config.toml:19: spread is 25h0m0s: it must be between 0s and 24h0m0s"},
		{"of the real one", "[source]\nspread = \"8m\"\n",
			`config.toml:2: source.speed, source.rollover and source.spread are for source.kind = "simulated" only`},
		{"of the simulated one", "[source]\nkind = \"simulated\"\nspread = \"25h\"\n",
			"config.toml:3: source.spread is 25h0m0s: it must be between 0s and 24h0m0s"},
		{"one bracket", "[[identity]]\nname = \"a\"\n\n[resource]\nuri = \"api://x\"\n",
			"config.toml:4: resource 1: write it with two brackets, [[resource]]: there may be several"},
		{"a word for a lost record", harness.GoodConfig + "\n[tokens]\nlost_record = \"drop\"\n",
			`config.toml:19: tokens.lost_record is "drop": it must be "serve" or "withhold"`},
		{"unknown key", resource("url = \"api://x\"\n"),
			"config.toml:19: unknown key resource.url: [[resource]] has uri and alternates"},
		{"unknown table", "[resources]\n",
			"config.toml:1: unknown key resources: the tables are [source], [tokens], [callers], [loopback], " +
				"[iothub], [[identity]], [[grant]], [[resource]] and [[module]]"},
		{"no URI", resource(alternates), "config.toml:18: the resource is empty"},
		{"no alternates", resource("uri = \"api://x\"\n"),
			"config.toml:18: resource api://x has 0 alternates: name 1 to 8"},
		{"its own", resource("uri = \"api://y\"\n" + alternates),
			"config.toml:18: the alternates of api://y: it is no alternate of itself"},
		{"twice", resource("uri = \"api://x\"\n"+alternates) + "\n[[resource]]\nuri = \"api://x\"\n" + alternates,
			"config.toml:22: resource api://x is there twice"},
	} {
		_, err := Load(harness.WriteConfig(t, map[string]string{"config.toml": row.text}))
		if err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v\nwant %s", row.name, err, row.want)
		}
	}
	path := harness.WriteConfig(t, map[string]string{
		"config.toml": resource("uri = \"api://x\"\n" + alternates),
		"config.d/a.toml": "\n[[resource]]\nuri = \"api://y\"\nalternates = [\"api://z\"]\n\n[[resource]]\nuri = " +
			"\"api://x\"\n" + alternates,
	})
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "a.toml:6: resource api://x is there twice") {
		t.Errorf("in two files: %v", err)
	}
}

func TestLostRecordInTheConfiguration(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{"": false, `lost_record = "serve"`: false,
		`lost_record = "withhold"`: true} {
		c, err := Load(harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig + "\n[tokens]\n" +
			text + "\n"}))
		if err != nil || c.Rules.WithholdLost != want {
			t.Errorf("%s: %v, %v", text, c.Rules.WithholdLost, err)
		}
		if said := strings.Contains(c.Describe(), "tokens from before are withheld"); said != want {
			t.Errorf("%s: %s", text, c.Describe())
		}
	}
}
