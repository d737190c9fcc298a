package hardware

import (
	"slices"
	"strings"
	"testing"

	"farkeep/image/fdt"
	"farkeep/image/kmodules"
	"farkeep/shared/card"
)

func TestEveryBoardHasNeedsOfEveryKind(t *testing.T) {
	for _, b := range card.SupportedBoards() {
		for _, function := range Functions() {
			if !slices.ContainsFunc(Needs(b), func(n Need) bool { return n.Function == function }) {
				t.Errorf("%s: nothing is said about its %s", b.Name, function)
			}
		}
	}
	if Needs(card.Board{Compatible: "raspberrypi,5-model-b"}) != nil {
		t.Error("an unsupported board has needs")
	}
}

func index(t *testing.T, dep, alias, builtin string) *kmodules.Index {
	t.Helper()
	ix, err := kmodules.Load(kmodules.Memory([]kmodules.File{
		{Path: "modules.dep", Data: []byte(dep)}, {Path: "modules.alias", Data: []byte(alias)},
		{Path: "modules.softdep"}, {Path: "modules.builtin", Data: []byte(builtin)}, {Path: "modules.builtin.modinfo"},
	}))
	if err != nil {
		t.Fatal(err)
	}
	return ix
}

func TestCheckOfOneNeed(t *testing.T) {
	tree := []fdt.Node{{Path: "/", Compatible: []string{"board"}}, {Path: "/rng", Compatible: []string{"maker,rng2", "maker,rng"}}}
	ix := index(t, "kernel/rng.ko:\nkernel/smsc95xx.ko:\n",
		"alias of:N*T*Cmaker,rng rng\nalias usb:v0424pEC00d*dc*dsc*dp*ic*isc*ip*in* smsc95xx\n", "kernel/gpio.ko\n")
	for _, tt := range []struct {
		name   string
		need   Need
		tree   []fdt.Node
		kernel string
		want   string // of the error, "" for none
	}{
		{"module", Need{"", "maker,rng", ""}, tree, "", ""},
		{"not announced", Need{"", "other,rng", ""}, tree, "", "does not announce"},
		{"no driver", Need{"", "maker,gpio", ""}, nil, "", "no module"},
		{"built in", Need{"", "maker,gpio", "gpio"}, nil, "xmaker,gpio\x00", ""},
		{"built in, but for something else", Need{"", "maker,gpio", "gpio"}, nil, "maker,gpio2\x00", "no module"},
		{"not built in", Need{"", "maker,gpio", "gpio2"}, nil, "maker,gpio\x00", "no module"},
		{"soldered USB device", Need{"", "usb424,ec00", ""}, nil, "", ""},
		{"other USB device", Need{"", "usb424,ec01", ""}, nil, "", "no module"},
		{"modalias", Need{"", "usb:v0424pEC00d0000dc00dsc00dp00ic00isc00ip00in00", ""}, tree, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := check(tt.need, tt.tree, ix, []byte(tt.kernel))
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("error %v; want %q", err, tt.want)
			}
		})
	}
}

func TestCheckNamesEverythingThatIsMissing(t *testing.T) {
	b := card.SupportedBoards()[0]
	_, err := Check(b, nil, index(t, "", "", ""), nil)
	if err == nil {
		t.Fatal("a kernel without drivers passes")
	}
	for _, function := range Functions() {
		if !strings.Contains(err.Error(), function) {
			t.Errorf("%q does not name %s", err, function)
		}
	}
}
