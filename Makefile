# What a developer does with this repository. `make` lists it.

# Root may build in another user's repository, which git does not trust by itself.
GIT      = git -c safe.directory='$(CURDIR)'
VERSION ?= $(shell $(GIT) describe --tags --always --dirty 2>/dev/null || echo development)
COMMIT  ?= $(shell $(GIT) rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
DATE    ?= $(shell $(GIT) log -1 --format=%cI 2>/dev/null || echo unknown)

# Go keeps what it fetches and compiles below HOME, and here where there is none.
ifeq ($(HOME),)
export GOPATH ?= $(CURDIR)/bin/go
export GOCACHE ?= $(CURDIR)/bin/go-cache
endif

export CGO_ENABLED = 0
GO       = go
LDFLAGS  = -s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT) -X main.date=$(DATE)
# -buildvcs=false: Go would ask git once more, and end where git does not trust the folder.
BUILD    = $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)'
FUZZTIME ?= 30s
SINCE ?=
LIVES_SECONDS ?= 600
LIVES_SEED ?=
LIVES_COMMIT ?=
STALENESS_DOCS ?= $(CURDIR)/docs
TESTFLAGS ?=
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

# Installs what a target needs from Debian's packages, as root; says which are missing otherwise.
apt = @missing=; for p in $(1); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else echo "this needs Debian's packages:$$missing (apt-get install, as root)" >&2; exit 1; fi

.DEFAULT_GOAL := help
.PHONY: help build demo demo-fleet test test-race test-system test-containers test-attacks test-clients test-hub fuzz bench bench-flood fault-matrix bench-staleness architecture lives mutations soak lint cover cross install uninstall clean

help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## Static bin/perceptd and bin/perceptctl
	@mkdir -p bin
	$(BUILD) -o bin/ ./cmd/perceptd ./cmd/perceptctl
	@touch bin/perceptd bin/perceptctl
	@$(GIT) rev-parse HEAD >bin/commit 2>/dev/null || rm -f bin/commit

demo: ## The 24 hours of a token in half a minute, on a simulated back end: a policy change, a denial, an outage
	@MAKE='$(MAKE)' deploy/demo.sh

demo-fleet: ## 200 devices on an IoT Hub on loopback: how a policy change spreads, a denial, an outage (half a minute)
	@$(GO) run ./cmd/fleetdemo $(FLEET)

test: ## Every test that needs nothing but Go
	$(GO) vet ./...
	$(GO) test $(TESTFLAGS) ./...

test-race: ## The same under the race detector (needs gcc)
	CGO_ENABLED=1 $(GO) test -race $(TESTFLAGS) ./...

test-system: build ## The daemon under a real systemd, in a container (root; installs Debian's packages)
	$(call apt,systemd-container mmdebstrap swtpm)
	$(GO) test -tags system -count=1 -timeout 30m -run '^TestSystem' -v ./systemd

test-containers: ## The daemon beside a real Docker and Podman (root; installs Debian's packages)
	$(call apt,docker.io podman runc crun)
	$(GO) test -tags containers -count=1 -timeout 15m -run '^TestContainers' -v ./cmd/perceptd/e2e/containers

test-attacks: ## Real users attack the daemon, which has the unit's limits (root)
	$(GO) test -tags attacks -count=1 -timeout 10m -parallel 2 -run '^TestAttacks' -v ./cmd/perceptd/e2e/attacks

test-clients: ## Azure's own SDKs and command line ask the daemon (root; Debian's packages and npm's); CLIENTS_DOCS=1 keeps the tables
	$(call apt,python3-azure azure-cli faketime curl iproute2 $(if $(shell command -v npm),,nodejs npm) docker.io podman runc)
	@mkdir -p bin/clients
	@cmp -s docs/modules/node/package-lock.json bin/clients/package-lock.json || { cp docs/modules/node/package.json bin/clients && \
		cp docs/modules/node/package-lock.json bin/clients && (cd bin/clients && npm ci --no-audit --no-fund) || { rm -f bin/clients/package-lock.json; exit 1; }; }
	$(GO) test -tags clients -count=1 -timeout 15m -parallel 20 -run '^TestClients' -v ./cmd/perceptd/e2e/clients

test-hub: ## Microsoft's own IoT Hub SDKs judge the hub for tests, and call the daemon through it (root; Node and npm's packages)
	$(call apt,iproute2 $(if $(shell command -v npm),,nodejs npm))
	@mkdir -p bin/hub
	@cmp -s cmd/perceptd/e2e/hub/testdata/package-lock.json bin/hub/package-lock.json || { cp cmd/perceptd/e2e/hub/testdata/package.json bin/hub && \
		cp cmd/perceptd/e2e/hub/testdata/package-lock.json bin/hub && (cd bin/hub && npm ci --no-audit --no-fund) || { rm -f bin/hub/package-lock.json; exit 1; }; }
	$(GO) test -tags hub -count=1 -timeout 5m -run '^TestHub' -v ./cmd/perceptd/e2e/hub

fuzz: ## Run each fuzz target for FUZZTIME (30s); SINCE=commit: of packages that changed since
	@.ci/fuzz $(FUZZTIME) $(SINCE)

bench: ## Measure the daemon beside net/http and nginx on the same kind of socket
	$(call apt,nginx-light)
	$(GO) test -tags bench -count=1 -timeout 20m -run '^TestBench$$' -v ./cmd/perceptd/e2e/bench
	$(GO) test -tags bench -count=1 -timeout 5m -run '^TestBenchModules$$' -v ./cmd/perceptd/e2e/bench
	$(GO) test -tags bench -count=1 -timeout 5m -run '^TestBenchAttestation$$' -v ./agent/attest

bench-flood: ## Report what others notice of one user who floods the daemon (root)
	$(GO) test -tags bench -count=1 -timeout 20m -run '^TestBenchFlood$$' -v ./cmd/perceptd/e2e/bench

fault-matrix: ## Go through every fault of back end and device (root); brings docs/reliability.md up to date
	FAULT_MATRIX_DOCS=1 $(GO) test -count=1 -run '^TestFaultMatrix$$|^TestArcFaultMatrix$$|^TestDeviceFaults$$|^TestRevocationsOnAFaultyDevice$$' -p 1 -v ./agent/server ./cmd/perceptd/e2e/daemon

bench-staleness: ## Simulate 60 days of policy changes; brings docs/staleness.md and its picture up to date
	STALENESS_DOCS=$(STALENESS_DOCS) $(GO) test -tags staleness -count=1 -timeout 20m -run '^TestStaleness$$' -v ./tokencache/staleness

architecture: ## Draw docs/architecture.svg: which package imports which
	ARCHITECTURE_DOCS=1 $(GO) test -count=1 -run '^TestArchitecture$$' ./cmd/perceptd

lives: ## Simulate whole lives of devices for LIVES_SECONDS (600), from LIVES_SEED on or a seed made of LIVES_COMMIT
	LIVES_SECONDS=$(LIVES_SECONDS) LIVES_SEED=$(LIVES_SEED) LIVES_COMMIT=$(LIVES_COMMIT) $(GO) test -count=1 -timeout 0 -run '^TestLives$$' -v ./agent/lives

mutations: ## Show that the lives notice faults in judging tokens, holding fetches, the record and the clock rules
	$(GO) test -tags mutations -count=1 -timeout 0 -run '^TestMutations$$' -v ./agent/lives

soak: ## The daemon at full load for SOAK_SECONDS (600) while its back end fails and its rules change
	$(GO) test -tags soak -count=1 -timeout 0 -run '^TestSoak$$' -v ./cmd/perceptd/e2e/soak

lint: ## gofmt, vet, staticcheck
	@unformatted=$$(gofmt -l .); if [ -n "$$unformatted" ]; then echo "not gofmt'ed:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet ./...
	$(GO) vet -tags system ./systemd
	$(GO) vet -tags bench ./cmd/perceptd/e2e/bench
	$(GO) vet -tags bench ./agent/attest
	$(GO) vet -tags containers ./cmd/perceptd/e2e/containers ./cmd/perceptd/e2e/harness
	$(GO) vet -tags attacks ./cmd/perceptd/e2e/attacks
	$(GO) vet -tags clients ./cmd/perceptd/e2e/clients
	$(GO) vet -tags hub ./cmd/perceptd/e2e/hub
	$(GO) vet -tags soak ./cmd/perceptd/e2e/soak
	$(GO) vet -tags staleness ./tokencache/staleness
	$(GO) vet -tags mutations ./agent/lives
	$(GO) run $(STATICCHECK) ./...

cover: ## Statement coverage; fails below 95 % of tokencache or 80 % of the whole
	@mkdir -p bin
	@$(GO) test -coverpkg=./... -coverprofile=bin/cover.out ./... >bin/cover.log || { cat bin/cover.log; exit 1; }
	@.ci/coverage bin/cover.out

cross: ## Static binaries for linux/amd64, linux/arm64 and linux/arm/v7 in bin/
	@mkdir -p bin
	@for target in amd64 arm64 arm; do \
		echo "linux/$$target"; mkdir -p bin/linux-$$target; \
		GOOS=linux GOARCH=$$target GOARM=7 $(BUILD) -o bin/linux-$$target/ ./cmd/perceptd ./cmd/perceptctl || exit 1; \
	done
	@ls -l bin/linux-*/ | awk '/percept/ {printf "  %-10s %.2f MB\n", $$NF, $$5/1e6}'
	@size=$$(stat -c %s bin/linux-arm64/perceptctl); if [ $$size -ge 8388608 ]; then \
		echo "perceptctl has $$size bytes on arm64, and is to be mounted into containers: below 8 MiB" >&2; exit 1; fi

install: ## Install what `make build` made, under DESTDIR or on this device as root; a version that runs is restarted
	@MAKE='$(MAKE)' DESTDIR='$(DESTDIR)' deploy/install.sh install

uninstall: ## Stop the units and take away what was installed; PURGE=1: configuration, keys and tokens too
	@DESTDIR='$(DESTDIR)' PURGE='$(PURGE)' deploy/install.sh uninstall

clean: ## Remove what was built
	rm -rf bin
