# moovm — run `make help` for what there is.

SHELL      := /bin/bash
GO         ?= go
MOOVM_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/moovm
export MOOVM_CACHE

BIN     := bin/moovm
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
GOFLAGS_BUILD := -trimpath -ldflags "-s -w -X main.version=$(VERSION)"

.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-fast test-race test-long test-fuzz test-e2e test-e2e-long lint staticcheck fuzz soak bench-disk bench-virtio bench-vmm bench-9p bench-fork clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install what the demo and the end-to-end tests need, and build the base image (cached)
	@scripts/setup.sh

build: $(BIN) ## Build bin/moovm, one static program

$(BIN): FORCE
	@CGO_ENABLED=0 $(GO) build $(GOFLAGS_BUILD) -o $@ ./cmd/moovm

demo: setup build ## The main job: boot stock Debian on a COW root disk, twice, and check everything
	@scripts/demo.sh

test: ## Everything: set-up, vet, unit tests with the race detector, end-to-end tests in the sandbox
	@$(MAKE) --no-print-directory setup
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test-race
	@$(MAKE) --no-print-directory test-long
	@$(MAKE) --no-print-directory test-fuzz
	@$(MAKE) --no-print-directory test-e2e

test-fast: ## go test ./...: needs neither root nor KVM nor QEMU
	$(GO) test ./...

test-race:
	@scripts/gotest.sh -race -timeout 10m ./...

test-fuzz: # a short run of what hostile guests and clients reach
	@$(MAKE) --no-print-directory fuzz FUZZTIME=20000x FUZZ='FuzzHostile|FuzzQueue|FuzzMessages|FuzzSession|FuzzOpen'

test-long: build # tens of thousands of simulated crashes, hundreds of kills, QEMU as a client; the init and the sandbox, static
	MOOVM_TEST_LONG=1 MOOVM_BIN=$(CURDIR)/$(BIN) MOOVM_KERNEL=$$(ls $(MOOVM_CACHE)/kernel/current/boot/vmlinuz-*) \
		MOOVM_BASE=$(MOOVM_CACHE)/base-bookworm.img MOOVM_BOOTDISK=$(MOOVM_CACHE)/bootdisk-bookworm.img scripts/gotest.sh -timeout 20m ./cowdisk ./virtio/vhostuser
	CGO_ENABLED=0 MOOVM_QEMU=1 MOOVM_KERNEL=$$(ls $(MOOVM_CACHE)/kernel/current/boot/vmlinuz-*) scripts/gotest.sh -timeout 20m ./internal/sandbox ./guest/guesttest ./guest ./guest/guestinit ./initramfs ./kernel ./kmod
	MOOVM_QEMU=1 MOOVM_BIN=$(CURDIR)/$(BIN) MOOVM_KERNEL=$$(ls $(MOOVM_CACHE)/kernel/current/boot/vmlinuz-*) \
		MOOVM_BASE=$(MOOVM_CACHE)/base-bookworm.img scripts/gotest.sh -timeout 20m -run Boxed ./cmd/moovm

test-e2e: build ## End-to-end tests with stock kernels, on this machine's KVM if it is good, else in the sandbox
	@scripts/e2e.sh

test-e2e-long: build ## Those, and the ones that take minutes: all kernels, sizes, fio, power cuts, copies of 10 000 files (hours in the sandbox)
	@scripts/fetch-kernel.sh current 5.10 5.10-cloud 6.1-cloud 6.12 6.12-cloud
	@MOOVM_TEST_LONG=1 scripts/e2e.sh

lint: ## gofmt, go vet, also for other systems (docs/PORTABILITY.md)
	@test -z "$$(gofmt -l .)" || { echo "gofmt wants to change:"; gofmt -l .; exit 1; }
	$(GO) vet ./...
	@scripts/vet-ports.sh

staticcheck: ## The deeper checks of honnef.co/go/tools
	$(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...

# Every fuzz target of the tree whose name matches FUZZ, FUZZTIME each.
FUZZTIME ?= 10m
FUZZ ?= .
fuzz: ## Fuzz every target (or those that match FUZZ) for FUZZTIME (10m) each
	@set -e; for f in $$(grep -rl '^func Fuzz' --include='*_test.go' --exclude-dir=testdata --exclude-dir=e2e .); do \
		for t in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' $$f | grep -E '$(FUZZ)'); do \
			echo "==> $$t in $$(dirname $$f)"; \
			$(GO) test -run '^$$' -fuzz "^$$t$$" -fuzztime $(FUZZTIME) $$(dirname $$f); \
		done; done

soak: ## Millions of simulated crashes, hundreds of kills, boots and resets; MOOVM_SOAK_TIME=10m each
	MOOVM_SOAK=1 MOOVM_TEST_LONG=1 $(GO) test -timeout 0 ./cowdisk/... ./virtio/... ./virtio9p/... ./guest/... ./kernel/... ./kmod/... ./internal/unpack/... ./internal/blkid ./vmm

bench-disk: ## cowdisk against raw files and qcow2; writes docs/BENCH-DISK.md
	$(GO) run ./cowdisk/benchdisk -dir $${TMPDIR:-/var/tmp} -o docs/BENCH-DISK.md

bench-virtio: ## The block device alone, and against qemu-storage-daemon over vhost-user (see docs/BENCH-VIRTIO.md)
	$(GO) test -run '^$$' -bench Null -cpu 1 ./virtioblk
	MOOVM_BENCH=1 MOOVM_BENCH_TABLE=$(CURDIR)/bin/bench-virtio.md $(GO) test -run '^$$' -bench Compare -count 3 -timeout 1h ./virtio/vhostuser

bench-vmm: build ## The machine beside QEMU in the sandbox: time to boot, memory, disk (see docs/VMM.md)
	MOOVM_TEST_LONG=1 scripts/e2e.sh 'TestLongMachine(BootTime|BootCosts|Costs|DiskSpeed)'

bench-fork: ## Snapshot, fork and rewind of bare-metal guests, on this machine's KVM (see docs/FORK.md)
	$(GO) test -run '^$$' -bench 'Fork|Snapshot|Rewind|Clone' -benchtime 100x ./vmm

bench-9p: build ## Shares beside QEMU's virtio-9p in the sandbox (see docs/BENCH-9P.md)
	MOOVM_TEST_LONG=1 scripts/e2e.sh TestLongShareSpeed

clean: ## Remove what was built here (the cache of kernels and images stays: it is in $(MOOVM_CACHE))
	rm -rf bin

FORCE:
