package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ledge-storage/ledge/host/agent"
)

func TestUsage(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := write("good.json", `{"name":"h1","shelf":{"apis":["http://127.0.0.1:1"]},"api":"`+dir+`/a.sock"}`)
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{nil, 2, "--config"},
		{[]string{"--colour"}, 2, "colour"},
		{[]string{"--config", good, "more"}, 2, "nothing else"},
		{[]string{"--config", dir + "/none.json"}, 2, "none.json"},
		{[]string{"--config", write("bad.json", `{"name":"H"}`), "--check"}, 2, `field "name": value "H"`},
		{[]string{"--config", write("dir.json", `{"name":"h1","shelf":{"apis":["http://127.0.0.1:1"]},"api":"/nowhere/a.sock"}`), "--check"}, 2, "/nowhere does not exist"},
		{[]string{"--config", write("large.json", `{"name":"`+strings.Repeat("x", 70<<10)+`"}`)}, 2, "at most 65536"},
		{[]string{"--config", good, "--check"}, 0, "good"},
		{[]string{"--help"}, 0, "spin_us"},
		{[]string{"--version"}, 0, "dev"},
	} {
		var out bytes.Buffer
		if code := run(c.args, &out, &out); code != c.code || !strings.Contains(out.String(), c.says) {
			t.Errorf("hostd %v: code %d, want %d; says %s", c.args, code, c.code, out.String())
		}
	}
}

// TestExample: what --help shows is taken as it stands, but for the files that it names.
func TestExample(t *testing.T) {
	dir := t.TempDir()
	text := example
	for _, name := range []string{"esx7", "self", "backup"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("a secret of "+name+" \n"), 0o600); err != nil {
			t.Fatal(err)
		}
		text = strings.ReplaceAll(text, "/etc/ledge/"+name, path)
	}
	c, err := agent.ParseConfig([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.CHAP) != 2 || c.CHAP[0].MutualSecret == "" {
		t.Errorf("%d entries", len(c.CHAP))
	}
}
