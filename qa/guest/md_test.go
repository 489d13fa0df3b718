package guest

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ledge-storage/ledge/image/modules"
	"github.com/ledge-storage/ledge/qa/guest/agent"
	"github.com/ledge-storage/ledge/qa/md"
)

// TestMD is md's half of qa/md's table, from this kernel: RAID-6 with a member that lies. What it finds must be what
// qa/md/linux.json says; that file is kept by hand.
func TestMD(t *testing.T) {
	h := sharedHost(t)
	h.load(t, "brd rd_nr=11 rd_size=4096", "raid456")
	rows, err := md.Linux(t.Context(), func(ctx context.Context, script string) (string, error) {
		a, err := h.Do(ctx, agent.Request{Argv: []string{"sh", "-c", script}, Seconds: int(patience.Seconds())})
		if err == nil && a.Code != 0 {
			err = fmt.Errorf("exit %d %s\n%s", a.Code, a.Error, a.Output)
		}
		return string(a.Output), err
	})
	if err != nil {
		t.Fatal(err)
	}
	golden, err := md.Golden()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(rows, golden) {
		t.Errorf("md answers otherwise than qa/md/linux.json says:\n%+v\nand not\n%+v", rows, golden)
	}
	t.Logf("md of Linux %s:\n%+v", h.Kernel(), rows)
}

// load loads modules, with their parameters, and what they depend on, which are not loaded at each boot because
// raid6_pq measures for seconds which of its algorithms is fastest.
func (h *host) load(t *testing.T, wanted ...string) {
	t.Helper()
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(b.Forward)
	_, root, release, err := kernel(filepath.Join(dir, "../.."))
	if err != nil {
		t.Fatal(err)
	}
	set, err := modules.Open(t.Context(), root, filepath.Join(dir, "modules-"+release))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	parameters := map[string]string{}
	for _, w := range wanted {
		name, p, _ := strings.Cut(w, " ")
		names, parameters[name] = append(names, name), p
	}
	order, err := set.Order(names)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range order {
		_, data := set.File(name)
		script := fmt.Sprintf("cat >/tmp/m.ko; grep -q '^%s ' /proc/modules || insmod /tmp/m.ko %s", name, parameters[name])
		a, err := h.Do(t.Context(), agent.Request{Argv: []string{"sh", "-c", script}, Input: data, Seconds: int(patience.Seconds())})
		if err != nil || a.Code != 0 {
			t.Fatalf("module %s: %v, exit %d %s\n%s", name, err, a.Code, a.Error, a.Output)
		}
	}
}
