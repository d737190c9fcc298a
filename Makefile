# Farkeep. "make demo" shows the main job, "make test" proves it.
# Both install the Debian packages that they need when they run as root.

export CGO_ENABLED := 0
GO       ?= go
FUZZTIME ?= 30s
KILLS    ?= 500
CUTS     ?= 50
NEEDS    := qemu-system-arm qemu-system-x86 mmdebstrap borgbackup rsync openssh-client openssh-server cryptsetup-bin \
            fuse3 python3-pyfuse3 e2fsprogs dosfstools mtools kmod xz-utils wireguard-tools nftables iproute2 systemd \
            rclone restic age zbar-tools gddrescue ssh-audit swtpm tpm2-tools

.PHONY: help all tools demo test test-fast lint bench bench-parts fuzz image simulate torture needs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

all: ## build the programs into bin/
	@mkdir -p bin
	$(GO) build -trimpath -buildvcs=auto -o bin/farkeep-pusher ./pusher
	$(GO) build -trimpath -buildvcs=auto -o bin/farkeep-keyserver ./keyserver
	$(GO) build -trimpath -buildvcs=auto -o bin/farkeep-image ./image
	$(GO) build -trimpath -buildvcs=auto -o bin/farkeep-appliance ./appliance
	GOARCH=arm64 $(GO) build -trimpath -buildvcs=auto -ldflags='-s -w' -o bin/farkeep-appliance-arm64 ./appliance

tools: ## build what a recovery bundle takes along, for both processors, into bin/tools/
	@mkdir -p bin/tools
	for arch in amd64 arm64; do for p in keyserver pusher; do \
	  GOARCH=$$arch $(GO) build -trimpath -buildvcs=auto -ldflags='-s -w' -o bin/tools/farkeep-$$p-$$arch ./$$p || exit 1; done; done

demo: needs all ## build an image, boot a Pi from it, push, cut its power, restore, raise the alarm
	bin/farkeep-image demo --bin bin

# Emulated machines take turns: a third package works while another one waits for its turn.
test: needs all ## run every test, the emulated Pi included
	$(GO) test -count=1 -timeout 28m -p 3 -tags vm ./...

test-fast: needs ## run the tests that need no emulator
	$(GO) test -timeout 10m ./...

lint: ## gofmt, go vet, staticcheck, govulncheck where they can be had
	.ci/lint

bench: needs all ## measure against what one would take instead, over lines: half an hour, tables and plots in bench/
	FARKEEP_BENCH=$(CURDIR)/bench $(GO) test -count=1 -timeout 4h -run '^$$' -bench '^BenchmarkLine$$' -benchtime 1x ./appliance

bench-parts: needs all ## run every other benchmark
	$(GO) test -timeout 2h -run '^$$' -bench . -skip '^BenchmarkLine$$' -benchtime 1x ./...

# Fuzzing that fails by "context deadline exceeded" has found nothing: Go says that of a slow worker when the time is up.
# What was found is a seed from then on, and fails again.
fuzz: ## run every fuzz target for FUZZTIME
	@for p in $$($(GO) list ./...); do for f in $$($(GO) test -list '^Fuzz' $$p | grep ^Fuzz); do \
	  echo "$$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x $$p || \
	  $(GO) test -count=1 -run "^$$f\$$" $$p || exit 1; done; done

simulate: ## live a year with real Borg: the figures of docs/retention.md, and the judge (an hour or two)
	FARKEEP_SIMULATE=300 $(GO) test -count=1 -timeout 6h -run TestRealBorg ./image/diskuse
	FARKEEP_FIGURES=write $(GO) test -count=1 -run TestFigures ./image/diskuse
	FARKEEP_SIMULATE=365 $(GO) test -count=1 -timeout 6h -v -run TestSimulation ./appliance/suspect

torture: needs ## kill and cut for long: SEED=n KILLS=500 CUTS=50
	FARKEEP_TORTURE_SEED=$(SEED) FARKEEP_TORTURE_KILLS=$(KILLS) FARKEEP_TORTURE_CUTS=$(CUTS) \
	  $(GO) test -count=1 -timeout 12h -v -tags vm ./image/torture

image: all ## build the flashable image into out/
	@mkdir -p out
	bin/farkeep-image build --appliance bin/farkeep-appliance-arm64 --out out/farkeep.img

needs:
	@.ci/needs $(NEEDS)

clean: ## remove what was built
	rm -rf bin out bench
