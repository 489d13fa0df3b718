package boards

import (
	"fmt"
	"net"
	"net/netip"
	"path"
	"regexp"
	"strings"
)

var (
	nameForm    = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)
	moduleForm  = regexp.MustCompile(`^[a-z0-9_]+$`)
	consoleForm = regexp.MustCompile(`^(ttyS|ttyAMA|hvc|tty)[0-9]+$`)
	pciForm     = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{2}:[0-1][0-9a-f]\.[0-7]$`)
	fwCfgForm   = regexp.MustCompile(`^opt/[a-z0-9./_-]{1,50}$`)
)

// maxDrives bounds what a pool's label can name; raid's own limit is smaller or equal.
const maxDrives = 255

// complaints collects what is wrong, each by the field's path.
type complaints []error

func (c *complaints) add(field, format string, args ...any) {
	*c = append(*c, fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...)))
}

// check returns everything wrong with b, whose file is called name.json.
func (b *Board) check(name string) []error {
	var c complaints
	switch {
	case !nameForm.MatchString(b.Name):
		c.add("name", "%q: lower case letters, digits and single hyphens only", b.Name)
	case b.Name != name:
		c.add("name", "%q: the file is called %s.json", b.Name, name)
	}
	if b.Description == "" || strings.ContainsAny(b.Description, "\n\r") {
		c.add("description", "one line is needed")
	}
	if !consoleForm.MatchString(b.Console) {
		c.add("console", "%q: not a console (ttyS0, hvc0, …)", b.Console)
	}
	for i, a := range b.KernelArgs {
		if a == "" || strings.ContainsAny(a, " \t\n\"") {
			c.add(fmt.Sprintf("kernel_args[%d]", i), "%q: one argument without spaces or quotes", a)
		}
		if strings.HasPrefix(a, "ledge.") {
			c.add(fmt.Sprintf("kernel_args[%d]", i), "%q: ledge.* belongs to the one who boots, not to the board", a)
		}
	}
	b.checkModules(&c)
	switch b.Config.Kind {
	case "fw_cfg":
		if !fwCfgForm.MatchString(b.Config.Name) {
			c.add("config.name", "%q: not a name under opt/", b.Config.Name)
		}
	case "disk":
		if b.Config.Name != "" {
			c.add("config.name", "%q: the boot disk's file is always called the same", b.Config.Name)
		}
		if len(b.Config.DiskModules) == 0 {
			c.add("config.disk_modules", "drivers of the boot disk, nls_cp437, nls_ascii and vfat are needed")
		}
	default:
		c.add("config.kind", "%q: known are fw_cfg, disk", b.Config.Kind)
	}
	switch b.NVRAM.Kind {
	case "pmem", "dax", "ssd", "file":
	default:
		c.add("nvram.kind", "%q: known are pmem, dax, ssd, file", b.NVRAM.Kind)
	}
	if b.NVRAM.TrustPLP && b.NVRAM.Kind != "ssd" {
		c.add("nvram.trust_plp", "it is about kind ssd, not %q", b.NVRAM.Kind)
	}
	if !cleanAbsolute(b.NVRAM.Path) {
		c.add("nvram.path", "%q: not an absolute path", b.NVRAM.Path)
	}
	b.checkLinks(&c)
	if b.MirrorPort < 1 || b.MirrorPort > 65535 {
		c.add("mirror_port", "%d: not a TCP port", b.MirrorPort)
	}
	if b.MirrorWindow != "" && !cleanAbsolute(b.MirrorWindow) {
		c.add("mirror_window", "%q: not an absolute path", b.MirrorWindow)
	}
	b.checkDrives(&c)
	if w := b.Watchdog; w != nil {
		if !cleanAbsolute(w.Path) || !strings.HasPrefix(w.Path, "/dev/") {
			c.add("watchdog.path", "%q: not a device", w.Path)
		}
		if w.TimeoutSeconds < 2 || w.TimeoutSeconds > 255 {
			c.add("watchdog.timeout_seconds", "%d: outside 2 to 255", w.TimeoutSeconds)
		}
	}
	return c
}

func (b *Board) checkModules(c *complaints) {
	if len(b.Modules) == 0 {
		c.add("modules", "at least one is needed")
	}
	checkModuleNames(c, "modules", b.Modules)
	checkModuleNames(c, "config.disk_modules", b.Config.DiskModules)
}

func checkModuleNames(c *complaints, list string, modules []string) {
	seen := map[string]bool{}
	for i, m := range modules {
		field := fmt.Sprintf("%s[%d]", list, i)
		if !moduleForm.MatchString(m) {
			c.add(field, "%q: a module's name is lower case letters, digits and underscores", m)
		}
		if seen[m] {
			c.add(field, "%q: listed twice", m)
		}
		seen[m] = true
	}
}

func (b *Board) checkLinks(c *complaints) {
	checkLink(c, "links.management", b.Links.Management)
	checkLink(c, "links.partner", b.Links.Partner)
	if b.Links.Management.Device == b.Links.Partner.Device {
		c.add("links.partner.device", "%q: is the management link's", b.Links.Partner.Device)
	}
	pa, pb := b.Links.Partner.Address("A"), b.Links.Partner.Address("B")
	if pa.IsValid() && pb.IsValid() {
		if pa.Addr() == pb.Addr() {
			c.add("links.partner.addresses", "A and B have the same address %s", pa.Addr())
		} else if pa.Masked() != pb.Masked() {
			c.add("links.partner.addresses", "%s and %s are not on one network", pa, pb)
		}
	}
	if b.Links.Partner.Gateway != "" {
		c.add("links.partner.gateway", "the partner link has none: nothing is routed over it")
	}
}

func checkLink(c *complaints, field string, l Link) {
	if _, err := net.ParseMAC(l.Device); err != nil && !pciForm.MatchString(l.Device) {
		c.add(field+".device", "%q: neither a PCI address (0000:00:04.0) nor a MAC address", l.Device)
	}
	for _, side := range []string{"A", "B"} {
		text, ok := l.Addresses[side]
		if !ok {
			c.add(field+".addresses", "controller %s has none", side)
		} else if _, err := netip.ParsePrefix(text); err != nil {
			c.add(field+".addresses."+side, "%q: not an address with a prefix length", text)
		}
	}
	for side := range l.Addresses {
		if side != "A" && side != "B" {
			c.add(field+".addresses", "%q: a controller is A or B", side)
		}
	}
	if l.Gateway == "" {
		return
	}
	gw, err := netip.ParseAddr(l.Gateway)
	if err != nil {
		c.add(field+".gateway", "%q: not an address", l.Gateway)
		return
	}
	for _, side := range []string{"A", "B"} {
		if p := l.Address(side); p.IsValid() && !p.Masked().Contains(gw) {
			c.add(field+".gateway", "%s is not on controller %s's network %s", gw, side, p.Masked())
		}
	}
}

func (b *Board) checkDrives(c *complaints) {
	if len(b.Drives.Globs) == 0 {
		c.add("drives.globs", "at least one is needed")
	}
	for i, g := range b.Drives.Globs {
		field := fmt.Sprintf("drives.globs[%d]", i)
		if !cleanAbsolute(g) {
			c.add(field, "%q: not an absolute path", g)
		} else if _, err := path.Match(g, "/dev/sda"); err != nil {
			c.add(field, "%q: %v", g, err)
		}
	}
	if b.Drives.Count < 3 || b.Drives.Count > maxDrives {
		c.add("drives.count", "%d: outside 3 to %d", b.Drives.Count, maxDrives)
	}
}

func cleanAbsolute(p string) bool { return path.IsAbs(p) && path.Clean(p) == p && p != "/" }
