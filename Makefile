# moovm — run `make help` for what there is.

SHELL      := /bin/bash
GO         ?= go
MOOVM_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/moovm
export MOOVM_CACHE

BIN     := bin/moovm
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
GOFLAGS_BUILD := -trimpath -ldflags "-s -w -X main.version=$(VERSION)"

.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-fast test-race test-e2e lint fuzz soak bench-disk bench-virtio clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
	@$(MAKE) --no-print-directory test-e2e

test-fast: ## go test ./...: needs neither root nor KVM nor QEMU
	$(GO) test ./...

test-race:
	MOOVM_TEST_LONG=1 $(GO) test -race -timeout 20m ./...

test-e2e: build ## End-to-end tests with stock kernels, on this machine's KVM if it is good, else in the sandbox
	@scripts/e2e.sh

lint: ## gofmt and go vet
	@test -z "$$(gofmt -l .)" || { echo "gofmt wants to change:"; gofmt -l .; exit 1; }
	$(GO) vet ./...

clean: ## Remove what was built here (the cache of kernels and images stays: it is in $(MOOVM_CACHE))
	rm -rf bin

FORCE:
