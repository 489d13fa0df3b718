# Ledge. `make help` lists the targets; `make run` starts everything on this machine.
SHELL   := /bin/bash
GO      ?= go
BIN     := build/bin
IMAGE   := build/image
RUN     ?= run
PORT    ?= 3260
FLAGS   := -trimpath -ldflags '-s -w -buildid='
MAINS   := ./firmware/shelfd ./host/hostd ./host/ledge ./qa/lab/ledgelab
# Packages whose tests boot machines or take other programs: they have targets of their own.
SLOW    := /qa/lab$$|/qa/guest$$|/qa/conformance

.DEFAULT_GOAL := help
.PHONY: help build image disk run run-local test unit store-sim lab guest lint conformance bench sim fuzz packages clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## all programs into build/bin
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build $(FLAGS) -o $(BIN)/ $(MAINS)

image: ## kernel and initramfs of a controller into build/image
	$(GO) run ./image

disk: ## the disk image to burn, build/image/ledge-BOARD.img (see BUILDING.md, Burn)
	$(GO) run ./image -disk

run: build packages image ## enclosure, two controllers in QEMU and an agent, with volume demo; Ctrl-C stops it
	@exec $(BIN)/ledgelab -run $(RUN) -image $(IMAGE) -bin $(BIN) -port $(PORT)

run-local: build ## the same system as processes on files, without QEMU
	@exec $(BIN)/ledgelab -local -run $(RUN)-local -bin $(BIN) -port $(PORT)

test: packages lint unit conformance lab guest ## everything that must pass: rules, unit tests, conformance, the booted system, a stock host

lint: ## gofmt, go vet
	@bad=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$bad" ]; then echo "gofmt is needed: $$bad"; exit 1; fi
	$(GO) vet ./...

unit: ## tests of every package, without the booted system (uncached: some build and run the daemons)
	$(GO) test -count=1 -timeout 20m $$($(GO) list ./... | grep -vE '$(SLOW)')
	$(MAKE) store-sim

store-sim: ## simulation of the host's store with small segments, and what its cleaner writes: SEEDS (20000, as make test has) from FIRST (1) on
	GOGC=400 $(GO) test -count=1 -timeout 0 -tags smallstore -v ./host/store -run 'TestSimulation$$|TestCleaningAmplification' -args -seeds $(or $(SEEDS),20000) -from $(or $(FIRST),1) \
	  | grep -vE '^ *(=== |--- PASS: TestSimulation/)'; test $${PIPESTATUS[0]} = 0

lab: build packages image ## end-to-end tests on the booted image
	$(GO) test -v -count=1 -timeout 25m ./qa/lab

guest: packages image ## a stock Linux host in QEMU (open-iscsi, multipath, fio, sg3-utils) against the target engine
	$(GO) test -v -count=1 -timeout 25m ./qa/guest

conformance: packages ## libiscsi's and our own conformance tests against the target engine
	$(GO) test -count=1 -timeout 20m ./qa/conformance/...

bench: packages ## the tables of speeds: targets against tgtd, gotgt and a loopback floor; storage against bare programs; volumes against qcow2
	@{ test -e /usr/include/iscsi/iscsi.h && command -v gcc >/dev/null; } || \
	  apt-get -o DPkg::Lock::Timeout=400 -qq -y --no-install-recommends install gcc libc6-dev libiscsi-dev
	$(GO) run ./qa/bench
	$(GO) run ./qa/bench/storage
	$(GO) run ./qa/bench/volumes

sim: ## simulation of power cuts, drives, links and takeovers: SEEDS (20000, as make test has) from FIRST (1) on
	$(GO) test -count=1 -timeout 0 -v ./qa/sim -args -seeds $(or $(SEEDS),20000) -first $(or $(FIRST),1)

fuzz: ## each fuzz test for FUZZTIME (default 30s)
	@for p in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u); do \
	  for f in $$(grep -h -o '^func Fuzz[A-Za-z0-9_]*' $$p/*_test.go | cut -c6-); do \
	    echo "$$p $$f"; $(GO) test $$p -run '^$$' -fuzz "^$$f\$$" -fuzztime $${FUZZTIME:-30s} || exit 1; \
	  done; done

packages: build ## the Debian packages that running and testing need, where they are missing
	@$(BIN)/ledgelab -install

clean: ## remove build/ (state of make run stays in run/)
	rm -rf build
