package main

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/explain"
	"perceptd/cmd/perceptctl/term"
)

// hub says how this device and IoT Hub are connected, and what of the twin is in force; "" where no hub is configured.
// Reasons that the trouble has given already are left out.
func (s screen) hub(status api.Status) string {
	if status.Hub == nil {
		return ""
	}
	now, h := hubNow(status), *status.Hub
	if isReported(status.Trouble, h.LastError) {
		h.LastError = ""
	}
	how, gap := term.Plain, "          "
	link := "connected"
	if !h.Connected {
		how, link = term.Warning, "not connected"
	}
	if !h.Since.IsZero() {
		link += " for " + explain.Duration(now.Sub(h.Since))
	}
	if name := hubName(&h); name != "" {
		link += ": " + name
	}
	text := s.Paragraph("iothub    ", link+", by "+transportName(h.Transport)+nextTry(now, &h), how)
	if h.LastError != "" {
		last := h.LastError
		if !h.LastErrorOn.IsZero() {
			last = explain.Duration(now.Sub(h.LastErrorOn)) + " ago: " + last
		}
		if h.Connected {
			last, how = "last error "+last, term.Faint
		}
		text += s.Paragraph(gap, last, how)
	}
	twin, how := twinText(now, &h, status.Deny.IsHubSetAside(), isReported(status.Trouble, h.Desired.Refused))
	text += s.Paragraph(gap, twin, how)
	if h.TwinError != "" {
		text += s.Paragraph(gap, unreadTwin(now, &h), term.Warning)
	}
	for _, idle := range h.Desired.Idle {
		text += s.Paragraph(gap, "idle: "+idle, term.Faint)
	}
	if e := h.Events; e != nil {
		text += s.Paragraph(gap, eventsText(*e), term.Plain)
	}
	return text
}

// isReported reports whether a trouble has said a reason.
func isReported(troubles []string, why string) bool {
	return why != "" && slices.ContainsFunc(troubles, func(t string) bool { return strings.Contains(t, why) })
}

// hubNow is the time by the clock of what the status says of the hub.
func hubNow(status api.Status) time.Time {
	if status.Hub == nil || status.Hub.Now.IsZero() {
		return status.Now
	}
	return status.Hub.Now
}

// hubName names the device as the hub knows it: "fleet.azure-devices.net/edge-17/percept"; "" where it is not known.
func hubName(h *api.HubStatus) string {
	return strings.Trim(strings.Join([]string{h.Hub, h.Device, h.Module}, "/"), "/")
}

func transportName(transport string) string {
	switch transport {
	case "mqtt":
		return "MQTT"
	case "websocket":
		return "WebSocket"
	}
	return transport
}

// nextTry says when a hub that is not connected is tried again, or "".
func nextTry(now time.Time, h *api.HubStatus) string {
	switch {
	case h.Connected:
		return ""
	case h.NextTry.After(now):
		return "; next try in " + explain.Duration(h.NextTry.Sub(now))
	case h.NextTry.IsZero() && h.Failure == api.HubFailureCredentials:
		return "" // no try may be made before a person has mended something
	}
	return "; it is being tried now"
}

// twinText says what of the twin's desired properties is in force, which is nothing where root has set it aside, and
// when the hub last took a report. It leaves out why a version is refused where that was reported.
func twinText(now time.Time, h *api.HubStatus, aside, reported bool) (text string, how term.Style) {
	d := h.Desired
	version := "twin version " + strconv.FormatInt(d.Version, 10)
	if !d.ReadOn.IsZero() {
		version += ", read " + explain.Duration(now.Sub(d.ReadOn)) + " ago,"
	}
	switch {
	case aside:
		text, how = "the twin is set aside", term.Warning
		if d.Version > 0 {
			text = version + " is set aside"
		}
	case d.Refused != "":
		if text, how = version+" is refused", term.Bad; !reported {
			text += ": " + d.Refused
		}
		text += explain.DeniesAllTheSame(d)
	case d.Version == 0:
		text = "the twin has not been read yet"
	case d.Applied == d.Version:
		text = version + " is in force"
	default:
		text, how = version+" is not in force", term.Warning
	}
	if why := explain.NoRoom(d); why != "" && !aside {
		text, how = text+"; "+why, term.Bad
	}
	if d.Applied > 0 && d.Applied != d.Version && !aside {
		text += "; version " + strconv.FormatInt(d.Applied, 10) + " stays in force"
	}
	if h.Reported.IsZero() {
		return text + "; nothing is reported yet", how
	}
	return text + "; reported " + explain.Duration(now.Sub(h.Reported)) + " ago", how
}

// unreadTwin says since when and why the twin cannot be read, and what that means.
func unreadTwin(now time.Time, h *api.HubStatus) string {
	return "its twin cannot be read for " + explain.Duration(now.Sub(h.TwinErrorSince)) + ": " + h.TwinError +
		"; what it says newly is not in force, but for what notifications add to deny"
}

func eventsText(e api.EventsStatus) string {
	text := explain.Counted(int(e.Sent), "event") + " sent"
	if e.Waiting > 0 {
		text += ", " + strconv.Itoa(e.Waiting) + " waiting"
	}
	if e.Dropped > 0 {
		text += ", " + strconv.FormatInt(e.Dropped, 10) + " dropped, since too many waited"
	}
	if e.Suppressed > 0 {
		text += ", " + strconv.FormatInt(e.Suppressed, 10) + " suppressed, since too many came"
	}
	return text
}

// reportedOfHub reports whether examineHub says a trouble, and more.
func reportedOfHub(h *api.HubStatus, trouble string) bool {
	if h == nil {
		return false
	}
	said := []string{trouble}
	return isReported(said, h.Desired.Refused) || (!h.Connected || h.Failure == api.HubFailureReplaced) &&
		(isReported(said, h.LastError) ||
			strings.HasPrefix(trouble, "IoT Hub is not connected"))
}

// examineHub says whether IoT Hub is connected, and why not, and whether what it sets is in force, unless root has set
// that aside, of which examineDeny says what ends it.
func examineHub(now time.Time, h *api.HubStatus, d *api.DenyStatus) (all []finding) {
	const what = "IoT Hub"
	if h == nil {
		return nil
	}
	switch away := now.Sub(h.Since); {
	case h.Connected && !h.IsCutSoon(now):
		all = append(all, finding{Verdict: pass, What: what,
			Is: "connected for " + explain.Duration(away) + " as " + hubName(h)})
	default:
		f := finding{note, what, "not connected for " + explain.Duration(away), hubNext(h)}
		if h.Connected {
			f.Is = "connected for " + explain.Duration(away) + ", and cut soon after each connect,"
		}
		if name := hubName(h); name != "" {
			f.Is += " as " + name
		}
		if h.LastError != "" {
			f.Is += ": " + h.LastError
		}
		if h.NeedsPerson(now) {
			f.Verdict = fail
		}
		if !d.IsLost() && !d.DeniesAll() {
			f.Is += ". Tokens are served without it"
		}
		all = append(all, f)
	}
	if h.TwinError != "" {
		f := finding{note, "twin", unreadTwin(now, h), "perceptd tries again by itself; a hub that answers 429 is " +
			"busy: see twin reads in the hub's metrics, and docs/fleet.md on quotas"}
		if now.Sub(h.TwinErrorSince) >= api.HubPatience {
			f.Verdict = fail
		}
		all = append(all, f)
	}
	if why := explain.NoRoom(h.Desired); why != "" && !d.IsHubSetAside() {
		all = append(all, finding{fail, "twin", why, "deny more with fewer entries of percept.deny, or everything " +
			"with one: all = true"})
	}
	if twin := h.Desired; twin.Refused != "" && !d.IsHubSetAside() {
		is := "version " + strconv.FormatInt(twin.Version, 10) + " of its desired properties is refused: " +
			twin.Refused + explain.DeniesAllTheSame(twin)
		if twin.Applied > 0 {
			is += "; version " + strconv.FormatInt(twin.Applied, 10) + " stays in force"
		}
		all = append(all, finding{fail, "twin", is, "correct percept in the twin's desired properties in IoT Hub; " +
			"docs/twin.schema.json says what may stand there"})
	}
	return all
}

// hubAdvice says what a person does about each kind of failure.
var hubAdvice = map[api.HubFailure]string{
	api.HubFailureCredentials: "mend what [iothub] names: perceptd --check looks at it; then perceptctl reload",
	api.HubFailureRefused: "in IoT Hub see that the device is there and enabled, and that its key or certificate is " +
		"the one that [iothub] names; then perceptctl reload",
	api.HubFailureName: "see that the host name in the connection string, hub or proxy is spelled as IoT Hub shows " +
		"it; getent hosts NAME tells whether this device finds it",
	api.HubFailureCertificate: "see that nobody opens TLS on the way: a gateway or proxy that does needs ca_file in " +
		"[iothub]; else the device's CA certificates may be old: package ca-certificates",
	api.HubFailureClock: "set this device's clock: timedatectl; perceptctl clock tells whether it is synchronised",
	api.HubFailureProxy: "see that proxy in [iothub] is right, and that it lets this device through to the hub's " +
		`port: many let only 443, for which there is transport = "websocket"`,
	api.HubFailureIdentity: "iotedge check, or aziotctl check, looks at IoT Edge's identity service; " +
		"docs/iothub.md tells how perceptd's user becomes one of its clients",
	api.HubFailureNetwork: "see that this device reaches the hub's port 8883, or with " +
		`transport = "websocket" 443: a firewall may be between; perceptd tries again by itself`,
	api.HubFailureReplaced: "another program, or another device with the same credentials, connects as this device: " +
		"give each an identity of its own in IoT Hub",
}

// hubNext says what to do about a hub that is not connected.
func hubNext(h *api.HubStatus) string {
	if h.Mend != "" {
		return h.Mend
	}
	if next, known := hubAdvice[h.Failure]; known {
		return next
	}
	return "perceptd tries again by itself; journalctl -u perceptd tells more"
}
