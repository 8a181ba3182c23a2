package systemd

import (
	"bufio"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"perceptd/agent/api"
)

// The files that a package installs, all of which stand in this folder.
const (
	serviceUnit = "perceptd.service"
	tokenUnit   = "perceptd.socket"
	adminUnit   = "perceptd-admin.socket"
	keyUnit     = "perceptd-cache-key.service"
	clockSocket = "perceptd-clock.socket"
	clockUnit   = "perceptd-clock@.service"
	configPath  = "perceptd-config.path"
	configUnit  = "perceptd-config.service"
	giveSocket  = "perceptd-modules.socket"
	giveUnit    = "perceptd-modules@.service"
	sysusers    = "perceptd.sysusers.conf"
	tmpfiles    = "perceptd.tmpfiles.conf"
	dropIns     = "perceptd.service.d"
)

// settings reads a unit file as "Section.Key" to its values in order.
func settings(t *testing.T, path string) map[string][]string {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	found, section := map[string][]string{}, ""
	for lines := bufio.NewScanner(file); lines.Scan(); {
		line := strings.TrimSpace(lines.Text())
		switch {
		case line == "", line[0] == '#':
		case line[0] == '[':
			section = strings.Trim(line, "[]")
		default:
			key, value, ok := strings.Cut(line, "=")
			if !ok {
				t.Errorf("%s: %q is no setting", path, line)
			}
			found[section+"."+key] = append(found[section+"."+key], value)
		}
	}
	return found
}

func TestSocketUnitsAgreeWithTheCode(t *testing.T) {
	t.Parallel()
	for unit, rows := range map[string]map[string]string{
		tokenUnit: {
			"Socket.ListenStream": api.DefaultTokenSocket, "Socket.FileDescriptorName": TokenSocket,
			"Socket.SocketMode": "0666",
		},
		adminUnit: {
			"Socket.ListenStream": api.DefaultAdminSocket, "Socket.FileDescriptorName": AdminSocket,
			"Socket.SocketMode": "0660", "Socket.SocketUser": "percept", "Socket.SocketGroup": "percept-admin",
		},
	} {
		got := settings(t, unit)
		rows["Socket.Service"] = serviceUnit
		rows["Socket.DirectoryMode"] = "0755"
		rows["Socket.TriggerLimitIntervalSec"] = "0" // no client can bring the socket down
		rows["Install.WantedBy"] = "sockets.target"
		for key, value := range rows {
			if !slices.Equal(got[key], []string{value}) {
				t.Errorf("%s: %s is %q, want %q", unit, key, got[key], value)
			}
		}
		for _, key := range []string{"Socket.Accept", "Socket.ListenDatagram", "Socket.ListenSequentialPacket",
			"Socket.RemoveOnStop"} {
			if got[key] != nil {
				t.Errorf("%s sets %s", unit, key)
			}
		}
	}
}

func TestServiceUnitAgreesWithTheCode(t *testing.T) {
	t.Parallel()
	got := settings(t, serviceUnit)
	for key, want := range map[string][]string{
		"Service.Type": {"notify"},
		"Service.ExecStart": {"/usr/bin/perceptd --config /etc/percept/config.toml --runtime-dir " +
			api.RuntimeDir},
		"Service.ExecReload": {"+/usr/bin/perceptctl reload",
			"+-/usr/bin/systemctl start " + configUnit},
		"Service.Sockets":                  {tokenUnit + " " + adminUnit},
		"Service.NotifyAccess":             {"main"},
		"Service.WatchdogSec":              {"30"},
		"Service.Restart":                  {"on-failure"},
		"Service.User":                     {"percept"},
		"Service.RuntimeDirectory":         {filepath.Join(filepath.Base(api.RuntimeDir), api.ModulesDirName)},
		"Service.RuntimeDirectoryPreserve": {"yes"},
		"Service.NoExecPaths":              {"/"},
		"Service.ExecPaths":                {"/usr/bin/perceptd"},
		"Unit.StartLimitIntervalSec":       {"0"}, // no sequence of requests brings the service down
		"Service.StateDirectory":           {"percept"},
		"Service.UMask":                    {"0077"},
		"Service.LimitCORE":                {"0"},
		"Service.RestrictAddressFamilies":  {"AF_UNIX AF_INET AF_INET6"},
	} {
		if !slices.Equal(got[key], want) {
			t.Errorf("%s is %q, want %q", key, got[key], want)
		}
	}
	for key, reason := range map[string]string{
		"Service.ProtectProc":    "callers of other users could not be told",
		"Service.ProcSubset":     "/proc/sys would be hidden, the boot's ID with it",
		"Service.PrivateUsers":   "callers would all read as 65534",
		"Service.DynamicUser":    "the runtime folder would change hands",
		"Service.ReloadSignal":   "systemd would signal beside ExecReload=",
		"Service.RootDirectory":  "certificates, modules and keys would have to be bound in one by one",
		"Service.PrivateNetwork": "the back end is on the network",
		"Service.ReadWritePaths": "the modules' folders and the state are all that it writes to",

		"Service.SupplementaryGroups": "the sandbox's own groups are enough: drop-ins add what else there is to " +
			"read",
		"Service.RestartPreventExitStatus": "each client that waits on a socket would have it started again at once",
	} {
		if got[key] != nil {
			t.Errorf("%s is set: %s", key, reason)
		}
	}
	if n, err := strconv.Atoi(strings.Join(got["Service.FileDescriptorStoreMax"], "")); err != nil || n < 1 {
		t.Errorf("FileDescriptorStoreMax is %q", got["Service.FileDescriptorStoreMax"])
	}
}

// A key that cannot be opened must not keep the daemon from starting.
func TestKeyUnitAgreesWithTheService(t *testing.T) {
	t.Parallel()
	service, got := settings(t, serviceUnit), settings(t, keyUnit)
	for _, key := range []string{"Unit.Wants", "Unit.After"} {
		if !slices.Contains(service[key], keyUnit) {
			t.Errorf("%s: %s is %q, without %s", serviceUnit, key, service[key], keyUnit)
		}
	}
	for _, key := range []string{"Unit.Requires", "Unit.BindsTo", "Unit.Requisite", "Service.LoadCredential",
		"Service.LoadCredentialEncrypted"} {
		if service[key] != nil {
			t.Errorf("%s: %s is set: perceptd would not start without it", serviceUnit, key)
		}
	}
	for key, want := range map[string][]string{
		"Unit.ConditionPathExists":     {"|/etc/percept/cache-key.cred", "|/etc/percept/cache-key"},
		"Unit.Before":                  {serviceUnit},
		"Service.Type":                 {"notify"},
		"Service.NotifyAccess":         {"main"},
		"Service.RemainAfterExit":      {"yes"},
		"Service.Restart":              nil, // perceptd would wait for a key that is not open yet
		"Service.ExecStart":            {"/usr/bin/perceptctl cache-key open"},
		"Service.Group":                service["Service.Group"],
		"Service.User":                 nil, // root, whom the host's key belongs to
		"Service.RuntimeDirectory":     {"percept-cache-key"},
		"Service.RuntimeDirectoryMode": {"0750"},
		"Service.LimitCORE":            {"0"},
		"Service.PrivateDevices":       nil, // would hide the TPM
		"Install.WantedBy":             nil,
	} {
		if !slices.Equal(got[key], want) {
			t.Errorf("%s: %s is %q, want %q", keyUnit, key, got[key], want)
		}
	}
}

// Root keeps the copy of the configuration, by what the daemon has recorded.
func TestConfigUnitsAgreeWithTheService(t *testing.T) {
	t.Parallel()
	service, path, got := settings(t, serviceUnit), settings(t, configPath), settings(t, configUnit)
	for _, key := range []string{"Unit.Wants", "Unit.After"} {
		if !slices.Contains(service[key], configPath) {
			t.Errorf("%s: %s is %q, without %s", serviceUnit, key, service[key], configPath)
		}
	}
	if got := path["Path.PathChanged"]; !slices.Equal(got, []string{"/var/lib/percept/config-in-force.json"}) {
		t.Errorf("%s watches %q", configPath, got) // store.ConfigRecord, which this package does not import
	}
	config, _, _ := strings.Cut(strings.TrimPrefix(service["Service.ExecStart"][0], "/usr/bin/perceptd "), " --runtime")
	for key, want := range map[string][]string{
		"Service.Type": {"oneshot"},
		"Service.ExecStart": {"/usr/bin/perceptd --keep-config " + config + " --state-dir /var/lib/" +
			service["Service.StateDirectory"][0]},
		"Service.User":                  nil, // root, whose the copy has to be
		"Service.Group":                 service["Service.Group"],
		"Service.StateDirectory":        {"percept-config"}, // config.KeptFolder
		"Service.StateDirectoryMode":    {"0750"},
		"Service.UMask":                 {"0027"},
		"Service.CapabilityBoundingSet": {"CAP_DAC_READ_SEARCH"},
		"Unit.StartLimitIntervalSec":    {"0"},
		"Install.WantedBy":              nil,
	} {
		if !slices.Equal(got[key], want) {
			t.Errorf("%s: %s is %q, want %q", configUnit, key, got[key], want)
		}
	}
}

// The daemon has the kernel's word on the clock without a call of its own that could set it.
func TestClockUnitsAgreeWithTheCode(t *testing.T) {
	t.Parallel()
	service, socket, got := settings(t, serviceUnit), settings(t, clockSocket), settings(t, clockUnit)
	for _, key := range []string{"Unit.Wants", "Unit.After"} {
		if !slices.Contains(service[key], clockSocket) {
			t.Errorf("%s: %s is %q, without %s", serviceUnit, key, service[key], clockSocket)
		}
	}
	if !slices.Equal(service["Service.ProtectClock"], []string{"yes"}) {
		t.Errorf("%s: ProtectClock is %q", serviceUnit, service["Service.ProtectClock"])
	}
	for _, row := range []struct {
		unit string
		has  map[string][]string
		want map[string][]string
	}{
		{clockSocket, socket, map[string][]string{
			"Socket.ListenStream": {"/run/percept/clock.sock"}, // clock.Socket, which this package does not import
			"Socket.Accept":       {"yes"},
			"Socket.SocketUser":   service["Service.User"],
			"Socket.SocketMode":   {"0600"},
		}},
		{clockUnit, got, map[string][]string{
			"Service.ExecStart":             {"/usr/bin/perceptctl clock"},
			"Service.StandardOutput":        {"socket"},
			"Service.SuccessExitStatus":     {"5"}, // not synchronised
			"Service.CapabilityBoundingSet": {""},
			"Service.ProtectClock":          nil,
			"Service.User":                  service["Service.User"],
			"Unit.CollectMode":              {"inactive-or-failed"},
			"Install.WantedBy":              nil,
		}},
	} {
		for key, want := range row.want {
			if !slices.Equal(row.has[key], want) {
				t.Errorf("%s: %s is %q, want %q", row.unit, key, row.has[key], want)
			}
		}
	}
}

// Engines start after perceptd, so that none makes a module's folder first. It is ordering alone, and bounded: what
// perceptd comes to keeps no engine from starting.
func TestEnginesStartAfterPerceptd(t *testing.T) {
	t.Parallel()
	service, key := settings(t, serviceUnit), settings(t, keyUnit)
	want := "docker.service containerd.service podman.service podman-restart.service"
	if got := service["Unit.Before"]; !slices.Equal(got, []string{want}) {
		t.Errorf("Before is %q", got) // no engine's socket: perceptd starts after sockets.target, which they are before
	}
	for _, section := range []string{"Unit.RequiredBy", "Unit.Requires", "Install.RequiredBy", "Unit.BindsTo"} {
		if service[section] != nil {
			t.Errorf("%s is set: an engine would wait for more than the order", section)
		}
	}
	for name, got := range map[string][]string{serviceUnit: service["Service.TimeoutStartSec"],
		keyUnit: key["Service.TimeoutStartSec"]} {
		if !slices.Equal(got, []string{"30"}) {
			t.Errorf("%s may take %q to start, and 60 seconds for both are promised", name, got)
		}
	}
}

// Root gives folders away by a unit that only percept may have started, and that may do nothing else.
func TestGivingUnitAgreesWithTheCode(t *testing.T) {
	t.Parallel()
	service, socket, got := settings(t, serviceUnit), settings(t, giveSocket), settings(t, giveUnit)
	for _, key := range []string{"Unit.Wants", "Unit.After"} {
		if !slices.Contains(service[key], giveSocket) {
			t.Errorf("%s: %s is %q, without %s", serviceUnit, key, service[key], giveSocket)
		}
	}
	for _, row := range []struct {
		unit      string
		has, want map[string][]string
	}{
		{giveSocket, socket, map[string][]string{
			"Socket.ListenStream":   {filepath.Join(api.RuntimeDir, api.FoldersSocketName)},
			"Socket.Accept":         {"yes"},
			"Socket.SocketUser":     service["Service.User"],
			"Socket.SocketMode":     {"0600"},
			"Socket.MaxConnections": {"4"},
			"Install.WantedBy":      nil,
		}},
		{giveUnit, got, map[string][]string{
			"Service.ExecStart":             {"/usr/bin/perceptctl module-folders"},
			"Service.StandardInput":         {"null"}, // it takes no word from percept
			"Service.StandardOutput":        {"socket"},
			"Service.User":                  nil,
			"Service.CapabilityBoundingSet": {"CAP_CHOWN CAP_FOWNER CAP_DAC_READ_SEARCH"},
			"Service.ProtectSystem":         {"strict"},
			"Service.ReadWritePaths":        {"-" + filepath.Join(api.RuntimeDir, api.ModulesDirName)},
			"Service.NoNewPrivileges":       {"yes"},
			"Service.RuntimeMaxSec":         {"10"},
			"Unit.CollectMode":              {"inactive-or-failed"},
			"Install.WantedBy":              nil,
		}},
	} {
		for key, want := range row.want {
			if !slices.Equal(row.has[key], want) {
				t.Errorf("%s: %s is %q, want %q", row.unit, key, row.has[key], want)
			}
		}
	}
}

func TestUsersAndFoldersAgreeWithTheUnits(t *testing.T) {
	t.Parallel()
	unit := settings(t, adminUnit)
	admin := func(key string) string { return strings.Join(unit["Socket."+key], " ") }
	for path, wants := range map[string][]string{
		sysusers: {"u percept ", "g percept-admin "},
		tmpfiles: {
			"d " + api.RuntimeDir + " 0755 root root -",
			"d " + filepath.Join(api.RuntimeDir, api.ModulesDirName) + " 0700 percept percept -",
			strings.Join([]string{"z", admin("ListenStream"), admin("SocketMode"), admin("SocketUser"),
				admin("SocketGroup"), "-"}, " "),
		},
	} {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for line := range strings.Lines(string(text)) {
			if !strings.HasPrefix(line, "#") {
				lines = append(lines, strings.Join(strings.Fields(line), " "))
			}
		}
		if len(lines) != len(wants) {
			t.Errorf("%s: %q", path, lines)
			continue
		}
		for i, want := range wants {
			if !strings.HasPrefix(lines[i], want) {
				t.Errorf("%s: line %q, want %q", path, lines[i], want)
			}
		}
	}
}

func TestDropInsAddOnlyWhatTheySay(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]map[string][]string{
		"azure-arc.conf": {"Service.SupplementaryGroups": {"himds"}},
		"iot-edge.conf":  {"Service.SupplementaryGroups": {"aziotid aziotks"}},
		// A credential that is not there keeps a service from starting, unless there is another in its place.
		"iothub-credential.conf": {
			"Service.LoadCredential": {"iothub:/etc/percept/iothub"}, "Service.SetCredential": {"iothub:none"},
		},
	} {
		got := settings(t, filepath.Join(dropIns, name))
		if len(got) != len(want) {
			t.Errorf("%s sets %v", name, got)
		}
		for key, value := range want {
			if !slices.Equal(got[key], value) {
				t.Errorf("%s: %s is %q, want %q", name, key, got[key], value)
			}
		}
	}
}

// What stands in this folder for the device is installed, each file once, and make uninstall goes by the same list.
func TestEveryUnitIsInstalled(t *testing.T) {
	t.Parallel()
	out, err := exec.Command("sh", "../deploy/install.sh", "files").Output()
	if err != nil {
		t.Fatal(err)
	}
	installed := make(map[string]string)
	for line := range strings.Lines(string(out)) {
		words := strings.Fields(line)
		if len(words) != 3 {
			t.Fatalf("not a mode, a file and its place: %q", line)
		}
		if installed[words[1]] != "" {
			t.Errorf("%s is installed twice", words[1])
		}
		installed[words[1]] = words[2]
	}
	units := 0
	err = filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || filepath.Ext(path) == ".go" {
			return err
		}
		to := installed["systemd/"+path]
		name := filepath.Base(path)
		switch {
		case path == sysusers, path == tmpfiles:
			name = "perceptd.conf"
		case filepath.Dir(path) == dropIns:
		default:
			units++
			if to != "/usr/lib/systemd/system/"+path {
				t.Errorf("%s is installed at %q", path, to)
			}
		}
		if to == "" || filepath.Base(to) != name {
			t.Errorf("%s is installed at %q", path, to)
		}
		return nil
	})
	if err != nil || units < 6 {
		t.Errorf("%d units, %v", units, err)
	}
}

// analyze runs systemd-analyze on an installation of the units in a folder of its own, with the given
// drop-ins and with programs that only look like ours.
func analyze(t *testing.T, dropInNames []string, arguments func(root, units string) []string) (string, error) {
	t.Helper()
	out, err := exec.Command("systemd-analyze", "--version").Output()
	if err != nil {
		t.Skipf("needs systemd-analyze: %v", err)
	}
	if words := strings.Fields(string(out)); len(words) < 2 || words[1] < "250" {
		t.Skipf("needs systemd-analyze 250 for --offline and --root, this is %.40q", out)
	}
	root := t.TempDir()
	units := filepath.Join(root, "etc/systemd/system")
	write := func(path, text string, mode fs.FileMode) {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755),
			os.WriteFile(path, []byte(text), mode)); err != nil {
			t.Fatal(err)
		}
	}
	files := []string{serviceUnit, tokenUnit, adminUnit, keyUnit, clockSocket, clockUnit, configPath, configUnit,
		giveSocket, giveUnit}
	for _, name := range dropInNames {
		files = append(files, filepath.Join(dropIns, name))
	}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		write(filepath.Join(units, name), string(text), 0o644)
	}
	for _, target := range []string{"sysinit", "basic", "shutdown", "sockets"} {
		write(filepath.Join(root, "usr/lib/systemd/system", target+".target"), "[Unit]\n", 0o644)
	}
	for _, program := range []string{"perceptd", "perceptctl", "systemctl"} {
		write(filepath.Join(root, "usr/bin", program), "", 0o755)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	report, err := exec.CommandContext(ctx, "systemd-analyze", arguments(root, units)...).CombinedOutput()
	return string(report), err
}

func TestUnitsVerify(t *testing.T) {
	t.Parallel()
	report, err := analyze(t, []string{"azure-arc.conf", "iot-edge.conf", "iothub-credential.conf"}, func(root, _ string) []string {
		return []string{"verify", "--man=no", "--root=" + root, serviceUnit, tokenUnit, adminUnit, keyUnit, clockSocket,
			configPath, configUnit, strings.Replace(clockUnit, "@", "@1", 1), giveSocket,
			strings.Replace(giveUnit, "@", "@1", 1)}
	})
	for line := range strings.Lines(report) {
		// 254
		if !strings.Contains(line, "Unknown key 'RestartSteps'") &&
			!strings.Contains(line, "Unknown key 'RestartMaxDelaySec'") {
			err = errors.Join(err, errors.New(line))
		}
	}
	if err != nil {
		t.Error(err)
	}
}

func TestServicesAreSandboxed(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		unit, threshold string // tenths
		dropIns         []string
	}{
		"as shipped":     {serviceUnit, "14", nil},
		"with Azure Arc": {serviceUnit, "15", []string{"azure-arc.conf"}},
		"with IoT Hub":   {serviceUnit, "15", []string{"iot-edge.conf", "iothub-credential.conf"}},
		"the key's":      {keyUnit, "14", nil},
		"the clock's":    {clockUnit, "15", nil},
		"the copy's":     {configUnit, "14", nil},
		"the folders'":   {giveUnit, "15", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			report, err := analyze(t, row.dropIns, func(_, units string) []string {
				return []string{"security", "--offline=true", "--no-pager", "--threshold=" + row.threshold,
					filepath.Join(units, row.unit)}
			})
			if err != nil {
				t.Errorf("%v\n%s", err, report)
			}
		})
	}
}
