package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
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
	next string // what to look at when the kernel does not count the clock as synchronised all the same
}

// timeDaemons are those of each unit's name.
var timeDaemons = map[string]timeDaemon{
	"chrony.service":            chrony,
	"chronyd.service":           chrony,
	"ntp.service":               ntpd,
	"ntpd.service":              ntpd,
	"ntpsec.service":            ntpd,
	"openntpd.service":          {"openntpd", "ntpctl -s all tells whether it has a server"},
	"systemd-timesyncd.service": {"systemd-timesyncd", "timedatectl timesync-status tells whether it has a server"},
}

var (
	chrony = timeDaemon{"chrony", "chronyc tracking tells whether it has a server; with rtcsync in its configuration it tells the kernel"}
	ntpd   = timeDaemon{"ntpd", "ntpq -p tells whether it has a server"}
)

// timeDaemonHere asks systemd which time daemon runs; the zero timeDaemon: none that is known.
func (a *app) timeDaemonHere(ctx context.Context) (running timeDaemon) {
	ask := []string{"show", "--property=Id,ActiveState"}
	for unit := range timeDaemons {
		ask = append(ask, unit)
	}
	said, _ := a.ask(ctx, "systemctl", ask...) // it ends otherwise where there is no systemd
	var id string
	for line := range strings.Lines(said) {
		switch key, value, _ := strings.Cut(strings.TrimSpace(line), "="); {
		case key == "Id":
			id = value
		case key == "ActiveState" && value == "active" && timeDaemons[id].name != "":
			running = timeDaemons[id]
		case key == "":
			id = "" // the next unit
		}
	}
	return running
}

// examineClock says whether the wall clock counts as right, by whose word, and what to do where it does not.
func examineClock(c api.ClockStatus, by timeDaemon) finding {
	const what = "clock"
	vouched := strings.TrimSuffix("synchronised, says the "+c.By, " ")
	if by.name != "" {
		vouched += " (" + by.name + ")"
	}
	switch {
	case c.Known && c.By == "": // of a simulated back end that runs faster
		return finding{Verdict: fine, What: what, Is: "right by itself"}
	case c.Known && c.By == clock.ByTimesyncd:
		return finding{Verdict: fine, What: what, Is: "synchronised, says " + c.By}
	case c.Known:
		return finding{Verdict: fine, What: what, Is: vouched}
	case c.By == "":
		return finding{noted, what, "nobody can be asked whether it is synchronised, so it does not count as right",
			"systemctl status perceptd-clock.socket tells why perceptd cannot ask; perceptctl clock asks the kernel"}
	case by.name == "":
		return finding{noted, what, "not synchronised, says the " + c.By + ", and no time daemon runs",
			"install chrony, or enable systemd-timesyncd: revocations and reboots take longer to settle without the time"}
	}
	return finding{noted, what, "not " + vouched, by.next}
}
