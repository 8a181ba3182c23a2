package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"perceptd/agent/clock"
)

func (a *app) clockCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "clock",
		Short: "say whether the kernel counts this device's clock as synchronised",
		Long: `Say in a line whether the kernel counts this device's clock as synchronised, which
time daemons tell it: chrony (with rtcsync in its configuration), ntpd and
systemd-timesyncd. perceptd, whose sandbox hides that, learns it from this verb,
which perceptd-clock.socket runs for it. The exit status is 5 when it is not.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(context.Context) error {
			synchronised, err := clock.Kernel()
			if err != nil {
				return fmt.Errorf("the kernel does not tell: %w", err)
			}
			text := clock.Sentence(synchronised) + "\n"
			if !synchronised {
				return a.printTrouble(text)
			}
			return a.print(text)
		}),
	}
}

// timeDaemon is one that may keep the device's clock.
type timeDaemon struct {
	name string
	next string // what to look at when it runs and the kernel does not count the clock as synchronised
}

var (
	chrony = timeDaemon{"chrony",
		"chronyc tracking tells whether it has a server; with rtcsync in its configuration it tells the kernel"}
	ntpd      = timeDaemon{"ntpd", "ntpq -p tells whether it has a server"}
	openntpd  = timeDaemon{"openntpd", "ntpctl -s all tells whether it has a server"}
	timesyncd = timeDaemon{"systemd-timesyncd", "timedatectl timesync-status tells whether it has a server"}
)

// timeDaemons are those of each unit's name. Where none runs, the first that is there is the one that was meant to:
// timesyncd comes with systemd, and leaves the clock to others.
var timeDaemons = []struct {
	unit string
	timeDaemon
}{
	{"chrony.service", chrony},
	{"chronyd.service", chrony},
	{"ntpsec.service", ntpd},
	{"ntp.service", ntpd},
	{"ntpd.service", ntpd},
	{"openntpd.service", openntpd},
	{"systemd-timesyncd.service", timesyncd},
}

// timeKeeper is what systemd says of the time daemons that are here. The zero value: it knows of none.
type timeKeeper struct {
	timeDaemon
	unit  string
	state string // "active", or what systemd says of it, as "failed" or "inactive"
}

// findTimeDaemon asks systemd which time daemon runs, or else is there and does not.
func (a *app) findTimeDaemon(ctx context.Context) (found timeKeeper) {
	ask := []string{"show", "--property=Id,LoadState,ActiveState"}
	for _, of := range timeDaemons {
		ask = append(ask, of.unit)
	}
	output, _ := a.runProgram(ctx, "systemctl", ask...) // it ends otherwise where there is no systemd
	units := make(map[string]map[string]string)
	for unit := range strings.SplitSeq(output, "\n\n") {
		properties := make(map[string]string)
		for line := range strings.Lines(unit) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			properties[key] = value
		}
		units[properties["Id"]] = properties
	}
	for _, of := range timeDaemons {
		unit := units[of.unit]
		switch state := unit["ActiveState"]; {
		case state == "active":
			return timeKeeper{of.timeDaemon, of.unit, state}
		case unit["LoadState"] == "loaded" && (found.unit == "" || state == "failed" && found.state != "failed"):
			found = timeKeeper{of.timeDaemon, of.unit, state}
		}
	}
	return found
}
