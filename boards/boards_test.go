package boards

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
)

func TestEveryBoardLoads(t *testing.T) {
	if len(Names()) == 0 {
		t.Fatal("no boards")
	}
	for _, name := range Names() {
		b, err := Load(name)
		if err != nil {
			t.Fatal(err)
		}
		if b.Name != name {
			t.Errorf("%s is called %q", name, b.Name)
		}
	}
}

func TestUnknownBoard(t *testing.T) {
	for _, name := range []string{"", "pdp-11", "../boards/qemu-q35", "qemu-q35.json"} {
		if _, err := Load(name); !errors.Is(err, ErrUnknown) {
			t.Errorf("Load(%q): %v", name, err)
		}
	}
}

// TestWrongFieldIsNamed changes one field at a time and expects its path in the error, and the value.
func TestWrongFieldIsNamed(t *testing.T) {
	cases := []struct{ path, value, want string }{
		{"name", `"Q35"`, `name: "Q35"`},
		{"name", `"other"`, `name: "other": the file is called`},
		{"name", `7`, `name: a number`},
		{"description", `""`, `description:`},
		{"console", `"/dev/ttyS0"`, `console: "/dev/ttyS0"`},
		{"kernel_args", `["a b"]`, `kernel_args[0]: "a b"`},
		{"kernel_args", `["quiet","ledge.board=x"]`, `kernel_args[1]:`},
		{"modules", `[]`, `modules:`},
		{"modules", `["sg","sd-mod"]`, `modules[1]: "sd-mod"`},
		{"modules", `["sg","sg"]`, `modules[1]: "sg": listed twice`},
		{"config.disk_modules", `["nvme","x y"]`, `config.disk_modules[1]: "x y"`},
		{"config.disk_modules", `["nvme","nvme"]`, `config.disk_modules[1]: "nvme": listed twice`},
		{"config.kind", `"http"`, `config.kind: "http"`},
		{"config.name", `"etc/passwd"`, `config.name:`},
		{"nvram.kind", `"core"`, `nvram.kind: "core"`},
		{"nvram.path", `"pmem0"`, `nvram.path: "pmem0"`},
		{"nvram.trust_plp", `true`, `nvram.trust_plp: it is about kind ssd`},
		{"links.management.device", `"eth0"`, `links.management.device: "eth0"`},
		{"links.management.addresses.A", `"10.0.2.15"`, `links.management.addresses.A: "10.0.2.15"`},
		{"links.management.addresses", `{"A":"10.0.2.15/24"}`, `links.management.addresses: controller B has none`},
		{"links.management.addresses.C", `"10.0.2.15/24"`, `links.management.addresses: "C"`},
		{"links.management.gateway", `"10.0.3.1"`, `links.management.gateway: 10.0.3.1 is not on`},
		{"links.management.gateway", `"gw"`, `links.management.gateway: "gw"`},
		{"links.partner.device", `"0000:00:04.0"`, `links.partner.device: "0000:00:04.0": is the management`},
		{"links.partner.addresses.B", `"169.254.77.1/30"`, `links.partner.addresses: A and B have the same`},
		{"links.partner.addresses.B", `"169.254.78.2/30"`, `are not on one network`},
		{"links.partner.gateway", `"169.254.77.2"`, `links.partner.gateway:`},
		{"mirror_port", `0`, `mirror_port: 0`},
		{"mirror_port", `70000`, `mirror_port: 70000`},
		{"mirror_window", `"resource2"`, `mirror_window: "resource2"`},
		{"drives.globs", `[]`, `drives.globs:`},
		{"drives.globs", `["/dev/sd["]`, `drives.globs[0]: "/dev/sd["`},
		{"drives.count", `2`, `drives.count: 2`},
		{"watchdog.path", `"/tmp/x"`, `watchdog.path: "/tmp/x"`},
		{"watchdog.timeout_seconds", `1`, `watchdog.timeout_seconds: 1`},
		{"watchdog.timeout_seconds", `"60s"`, `watchdog.timeout_seconds: a string`},
		{"colour", `"red"`, `unknown field "colour"`},
	}
	for _, c := range cases {
		data := changed(t, c.path, c.value)
		_, err := Parse("qemu-q35.json", data)
		if err == nil {
			t.Errorf("%s = %s: accepted", c.path, c.value)
		} else if !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "qemu-q35.json") {
			t.Errorf("%s = %s:\n got %v\nwant %s", c.path, c.value, err, c.want)
		}
	}
}

// TestMissingFieldIsRefused deletes each top-level field in turn; only the watchdog may be missing.
func TestMissingFieldIsRefused(t *testing.T) {
	for field := range object(t) {
		o := object(t)
		delete(o, field)
		data, _ := json.Marshal(o)
		_, err := Parse("qemu-q35.json", data)
		optional := field == "watchdog" || field == "kernel_args"
		if optional != (err == nil) {
			t.Errorf("without %s: %v", field, err)
		} else if err != nil && !strings.Contains(err.Error(), field) {
			t.Errorf("without %s: the error does not name it: %v", field, err)
		}
	}
}

func TestAllProblemsAtOnce(t *testing.T) {
	_, err := Parse("x.json", []byte(`{"name":"x","mirror_port":-1}`))
	for _, field := range []string{"description", "console", "modules", "config.kind", "nvram.path", "links.partner.device", "mirror_port", "drives.count"} {
		if !strings.Contains(err.Error(), field) {
			t.Errorf("%s is not named in:\n%v", field, err)
		}
	}
}

// TestConfigOnDisk: a machine without fw_cfg needs drivers of its boot disk, and no file's name.
func TestConfigOnDisk(t *testing.T) {
	for _, c := range []struct{ config, want string }{
		{`{"kind":"disk","disk_modules":["ahci","vfat"]}`, ""},
		{`{"kind":"disk"}`, "config.disk_modules: "},
		{`{"kind":"disk","name":"opt/x","disk_modules":["vfat"]}`, "config.name: "},
	} {
		_, err := Parse("qemu-q35.json", changed(t, "config", c.config))
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", c.config, err, c.want)
		}
	}
}

func TestBrokenFile(t *testing.T) {
	good, _ := files.ReadFile("qemu-q35.json")
	for _, c := range []struct{ data, want string }{
		{"", "ends inside"},
		{"{", "ends inside"},
		{"{\n\"name\": }", "line 2"},
		{string(good) + "{}", "more follows"},
	} {
		if _, err := Parse("qemu-q35.json", []byte(c.data)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.20q: %v; want %q", c.data, err, c.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	good, _ := files.ReadFile("qemu-q35.json")
	f.Add(good)
	f.Add([]byte(`{"watchdog":{}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := Parse("qemu-q35.json", data)
		if err == nil && (!b.Links.Partner.Address("A").IsValid() || len(b.Modules) == 0) {
			t.Errorf("accepted %q", data)
		}
	})
}

func object(t *testing.T) map[string]any {
	t.Helper()
	data, err := files.ReadFile("qemu-q35.json")
	if err != nil {
		t.Fatal(err)
	}
	o := map[string]any{}
	if err := json.Unmarshal(data, &o); err != nil {
		t.Fatal(err)
	}
	return o
}

// changed returns the board file with the field at path set to the JSON value.
func changed(t *testing.T, path, value string) []byte {
	t.Helper()
	root := object(t)
	o := root
	keys := strings.Split(path, ".")
	for _, k := range keys[:len(keys)-1] {
		o = o[k].(map[string]any)
	}
	o[keys[len(keys)-1]] = json.RawMessage(value)
	data, err := json.Marshal(root)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
