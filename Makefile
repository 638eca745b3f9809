# make run    the main job: containers that outlive their daemon, its replacement, and the shim's worker
# make test   everything that must hold
# make conformance   containerd's requirements on a shim, clause by clause, tested on ours
PREFIX ?= /usr/local
CARGO ?= cargo
TARGET_DIR := $(shell $(CARGO) metadata --format-version 1 --no-deps 2>/dev/null | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
TRIPLE := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
SHIM := $(TARGET_DIR)/$(TRIPLE)/release/containerd-shim-x-v2
MANAGER := $(TARGET_DIR)/$(TRIPLE)/release/x-manager
XCTL := $(TARGET_DIR)/$(TRIPLE)/release/xctl
DEBUG := $(TARGET_DIR)/$(TRIPLE)/debug
FAULTY_SHIM := $(DEBUG)/containerd-shim-x-v2

# the commit that the programs are built from: `ps` and `-v` show it
X_REVISION ?= $(shell git describe --always --dirty --abbrev=12 --exclude '*' 2>/dev/null)
X_REVISION := $(X_REVISION)
export X_REVISION

.PHONY: build build-shim build-debug build-faulty run test test-unit test-e2e test-manager test-power test-quota test-cgroup2 test-cgroup2-native test-systemd test-cgroup2-guest faults campaign soak fuzz conformance conformance-docs stdio-docs conformance-cgroup2 conformance-tool
.PHONY: lint install uninstall packages suites bench bench-memory bench-pods bench-upgrade bench-manager bench-images bench-docker bench-tools clean

CONFORMANCE = $(CARGO) run --locked --quiet --package shim-tests --bin shim-conformance --

# Each by itself: together they would get each other's features of the crates that both use, and the tested shim would not be the installed one.
build: build-shim
	$(CARGO) build --locked --release --package x-manager

build-shim:
	$(CARGO) build --locked --release --package containerd-shim-x

## runs containers under x-manager, kills and replaces it and kills the shim's worker, and checks that nothing was lost;
## with DAEMON=containerd: a container under stock containerd, killed likewise. Debug builds: they compile in half the time. What is
## installed, tested and measured are release builds
run: packages build-debug
ifeq ($(DAEMON),containerd)
	X_SHIM=$(DEBUG)/containerd-shim-x-v2 tests/tools/demo
else
	X_MANAGER=$(DEBUG)/x-manager X_SHIM=$(DEBUG)/containerd-shim-x-v2 tests/tools/demo-manager
endif

## unit tests, then end-to-end tests on stock containerd 1.6, 1.7 and 2.1, then with x-manager in its place
test: test-unit test-e2e test-manager

test-unit: packages
	$(CARGO) test --locked --package containerd-shim-x --package x-proto --package x-manager --package x-engine --package scratch

# For time, each engine not with each containerd: the native one with all, runc with the oldest, crun with the newest; the protocol's clauses with
# the native engine alone; on v2 that engine with the newest containerd, without what cgroups have no part in. E2E_SKIP= CONFORMANCE_SKIP= and
# `make test-cgroup2-native` leave out nothing.
E2E_SKIP := --skip containerd-1.6::crun:: --skip containerd-1.7::crun:: --skip containerd-1.7::runc:: --skip containerd-2.1::runc::
CONFORMANCE_SKIP := --skip crun:: --skip runc::
E2E = X_SHIM=$(SHIM) X_SHIM_FAULTY=$(FAULTY_SHIM) $(CARGO) test --locked --package shim-tests
test-e2e: packages suites build-shim build-faulty
	$(E2E) --lib --bins --test conformance -- $(CONFORMANCE_SKIP)
	$(E2E) --test containerd --test cri --test faults --test protocol --test soak --test upgrade --test xctl -- $(E2E_SKIP)
	$(E2E) --test docker
	$(MAKE) test-cgroup2-native CGROUP2_TESTS="conformance containerd" CGROUP2_SKIP="--skip runc:: --skip crun:: --skip containerd-1.6:: --skip containerd-1.7:: \
		--skip stdio:: --skip outputs:: --skip versions:: --skip churn::"

## the tests of containerd (with the native engine and clients of 1.6 and 2.1 alone, for time), Docker and xctl with x-manager in containerd's place, x-manager's own, and lifecycles with the shims of containerd 1.6, 1.7
## and 2.1; X_KILLS=500 X_SEED=N for more crashes of x-manager, also with those shims. A debug build of x-manager, which is there already: a release build takes minutes more;
## TESTED_MANAGER=… names another
TESTED_MANAGER ?= $(DEBUG)/x-manager
test-manager: packages suites build-shim build-faulty
	X_SHIM=$(SHIM) X_DAEMON=$(TESTED_MANAGER) $(CARGO) test --locked --package shim-tests --test manager --test operations --test docker --test xctl
	X_SHIM=$(SHIM) X_DAEMON=$(TESTED_MANAGER) $(CARGO) test --locked --package shim-tests --test containerd -- --skip crun:: --skip runc:: --skip beside-1.7::
	X_RUNTIME_TYPE=io.containerd.runc.v2 X_DAEMON=$(TESTED_MANAGER) $(CARGO) test --locked --package shim-tests --test containerd -- lifecycle::

## CUTS power cuts at random moments of imports and deletions under x-manager, and under stock containerd for comparison: the disk that a cut would have
## left is made of a record of all writes and flushes (docs/images.md). Then KILLS crashes of x-manager during imports, deletions, collections and
## upgrades, and an import into a disk that is full after each few KiB more. X_SEED chooses the moments
CUTS ?= 200
KILLS ?= 500
POWER = X_SHIM=$(SHIM) X_DAEMON=$(TESTED_MANAGER) $(CARGO) test --locked --package shim-tests --test manager --
test-power: packages suites build-shim build-debug
	X_TIMES=4 X_CUTS=$(CUTS) $(POWER) --nocapture power::
	X_KILLS=$(KILLS) $(POWER) --nocapture image_kills::
	X_TIMES=8 $(POWER) --nocapture an_import_that_finds_no_room

## snapshots that are bounded by quotas of projects, on an ext4 and on an xfs in an emulated guest: this host's kernel may know no quotas
QUOTA_TEST = snapshots::tests::a_bounded_snapshot_takes_no_more_and_its_bound_goes_with_it
test-quota: packages
	tests/tools/install-packages e2fsprogs xfsprogs
	set -e; tests=$$($(CARGO) test --locked --no-run --package x-manager --bin x-manager --message-format json | sed -n 's,.*"executable":"\([^"]*/x_manager-[^"]*\)".*,\1,p'); \
	work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; strip -o "$$work/x-manager-tests" "$$tests"; \
	truncate -s 128M "$$work/ext4"; mkfs.ext4 -q -F -O project,quota -E quotatype=prjquota "$$work/ext4"; \
	truncate -s 320M "$$work/xfs"; mkfs.xfs -q "$$work/xfs"; \
	X_VM_MIB=1536 tests/tools/cgroup2-vm --disk "$$work/ext4" --disk "$$work/xfs" --with "$$work/x-manager-tests" /bin/sh -ec \
		"try() { mkdir /disk; mount -t \$$2 -o prjquota \$$1 /disk; TMPDIR=/disk X_BOUNDED=\$$2 $$work/x-manager-tests --nocapture --exact $(QUOTA_TEST); umount /disk; rmdir /disk; }; \
		try /dev/vda ext4; try /dev/vdb xfs"

## the host's systemd as pid 1 of namespaces of its own: containers whose cgroups it makes, on v2 and on v1; x-manager's units: activation, reload, crash, stop, shutdown
test-systemd: suites build build-faulty
	tests/tools/install-packages systemd dbus
	tests=$$($(CARGO) test --locked --no-run --package shim-tests --test systemd --message-format json | sed -n 's,.*"executable":"\([^"]*/systemd-[^"]*\)".*,\1,p') && \
	X_MANAGER=$(MANAGER) X_SHIM=$(SHIM) X_SHIM_FAULTY=$(FAULTY_SHIM) X_SYSTEMD_TESTS=$$tests tests/tools/systemd-check

## on cgroup v2: natively, and in an emulated guest for tests whose controllers this host has on v1: too slow to be part of `test`
test-cgroup2: test-cgroup2-native test-cgroup2-guest conformance-cgroup2

## on the unified hierarchy alone, with the controllers that v1 leaves there; tests that need others are skipped, with the reason
CGROUP2_TESTS := conformance containerd cri docker protocol soak
test-cgroup2-native: packages suites build-shim
	X_CGROUP=2 X_SHIM=$(SHIM) X_SHIM_FAULTY=$(FAULTY_SHIM) $(CARGO) test --locked --package shim-tests $(addprefix --test ,$(CGROUP2_TESTS)) -- --skip fault:: --skip document:: $(CGROUP2_SKIP)

test-cgroup2-guest: packages build
	tests/tools/cgroup2-vm --with $(SHIM) --with containerd --with ctr --with runc --with crun \
		tests/tools/cgroup2-check $(SHIM) native runc crun
	engine=$$($(CARGO) test --locked --no-run --package x-engine --test engine --message-format json | sed -n 's,.*"executable":"\([^"]*/engine-[^"]*\)".*,\1,p') && \
	X_VM_SECONDS=3600 tests/tools/cgroup2-vm --with $$engine --with unshare --with nsenter --with runc --with crun \
		/bin/sh -c "for module in $(ENGINE_ON_V2); do $$engine \$$module:: || failed=1; done; exit \$${failed:-0}"

# the engine's own tests whose subjects depend on the kind of cgroups, those that compare it with runc and crun among them
ENGINE_ON_V2 := nesting v2 execs differences

## the protocol's clauses, on our shim, with its own engine and both OCI runtimes, on the host's cgroups and on v2. Without CAP_SYS_RESOURCE Debian 12's crun
## cannot filter devices on v2: the next one's can. Debian 12 has no criu: the next but one has, which the native engine uses, and OCI runtimes of that suite.
## Tests that repeat do so a few times; X_TIMES=N, here and for the other tests: N times as often (docs/field.md).
SUITES := $(or $(X_TESTS_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/x-tests)
conformance: packages suites build conformance-tool
	$(CONFORMANCE) run --shim $(SHIM) --expect tests/expect/x.toml --engine native
	$(CONFORMANCE) run --shim $(SHIM) --expect tests/expect/x.toml --cgroup 2 --engine native
	$(CONFORMANCE) run --shim $(SHIM) --expect tests/expect/x.toml --engine crun
	$(CONFORMANCE) run --shim $(SHIM) --expect tests/expect/x.toml --engine runc
	$(CONFORMANCE) run --shim $(SHIM) --expect tests/expect/x.toml --cgroup 2 --engine $(SUITES)/trixie/bin/crun
	$(CONFORMANCE) run --shim $(SHIM) --expect tests/expect/x.toml --cgroup 2 --engine runc
	$(CONFORMANCE) run --shim $(SHIM) --expect tests/expect/x.toml --filter R8 --engine $(SUITES)/forky/bin/crun
	$(CONFORMANCE) run --shim $(SHIM) --expect tests/expect/x.toml --filter R8 --engine $(SUITES)/forky/bin/runc

## the clauses that depend on cgroups, and the first of every kind, on cgroup v2 with all controllers: in an emulated guest, some minutes
CGROUP2_CLAUSES := resources. C11 C12 L1 L2 P1 S1 D1 E1
conformance-cgroup2: packages build conformance-tool
	tools=$(DEBUG); \
	for engine in native runc crun; do \
		tests/tools/cgroup2-vm --with $$tools/gated-runtime --with $$tools/log-sink --with $(SHIM) --with runc --with crun \
			$$tools/shim-conformance run --shim $(SHIM) --engine $$engine --jobs 1 --patience 10 \
			$(addprefix --filter ,$(CGROUP2_CLAUSES)) || exit 1; \
	done

conformance-tool:
	$(CARGO) build --locked --package shim-tests --bins

## containers and processes for MINUTES while everything around them fails, then an audit: the shim with a fake daemon, then with
## containerd 2.1, 1.7 and 1.6; X_SEED repeats a run
MINUTES ?= 10
SOAK = X_SHIM=$(SHIM) X_SOAK_SECONDS=$$(( $(MINUTES) * 15 )) $(CARGO) test --locked --package shim-tests --test soak
soak: packages suites build
	$(SOAK)
	X_SOAK_CONTAINERD=1.7 $(SOAK) -- every_exit_is_known
	X_SOAK_CONTAINERD=1.6 $(SOAK) -- every_exit_is_known

## each parser of bytes from outside for FUZZ_SECONDS, guided by coverage; failing inputs are in fuzz/artifacts, new interesting ones
## in fuzz/found. Unit tests replay fuzz/corpus, with mutations, in `test`. No sanitizer, so no nightly compiler: no parser has unsafe code.
FUZZ_SECONDS ?= 300
FUZZ_TARGETS := frame bootstrap options config journal handover engine tar registry hosts image stream write
CARGO_FUZZ_VERSION := 0.13.2
fuzz:
	$(CARGO) fuzz --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-fuzz@$(CARGO_FUZZ_VERSION)
	cd fuzz && for target in $(FUZZ_TARGETS); do \
		mkdir -p found/$$target && $(CARGO) fuzz run --sanitizer none $$target found/$$target corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 || exit 1; done

## docs/conformance.md: our shim and the stock shims of containerd 1.6, 1.7 and 2.1; and docs/faults.md; takes an hour
conformance-docs: packages suites build conformance-tool
	SHIM=$(SHIM) CONFORMANCE="$(CONFORMANCE)" tests/tools/conformance-docs

## the table of docs/stdio.md: what arrives of outputs with our shim and with the stock shims, in one run
stdio-docs: packages suites build
	TEST="env X_STDIO_TABLE=1 X_SHIM=$(SHIM) $(CARGO) test --locked --quiet --package shim-tests --test containerd --" tests/tools/stdio-docs

## a worker's crash at every message of every scenario, on the oldest and the newest containerd, and the keeper's at every message of the sandbox calls: `test`
## runs some of them on one of the two
faults: packages suites build-faulty
	X_SHIM_FAULTY=$(FAULTY_SHIM) X_FAULTS_ALL=1 $(CARGO) test --locked --package shim-tests --test faults -- --skip campaign::

## N runs with random crashes, stops and upgrades of the worker, on the oldest and the newest containerd; X_SEED chooses which
N ?= 1000
campaign: packages suites build-faulty
	X_SHIM_FAULTY=$(FAULTY_SHIM) X_CAMPAIGN=$(N) X_CAMPAIGN_WITHIN=$$(( $(N) * 10 + 600 )) $(CARGO) test --locked --package shim-tests --test faults -- campaign

## how long a client waits while its shim is upgraded, one upgrade of 1,000 shims, gain and cost of hibernating workers
bench-upgrade: packages build bench-tools
	X_SHIM=$(SHIM) $(CARGO) run --locked --release --package shim-tests --features bench --bin upgrade-bench -- --rounds 2000
	X_SHIM=$(SHIM) $(CARGO) run --locked --release --package shim-tests --features bench --bin upgrade-bench -- --shims 1000
	X_SHIM=$(SHIM) X_SHIM_IDLE_SECONDS=5 $(CARGO) run --locked --release --package shim-tests --features bench --bin upgrade-bench -- --rest 50

# the benchmarks, and the test doubles that they use
bench-tools:
	$(CARGO) build --locked --release --package shim-tests --features bench --bins

build-debug:
	$(CARGO) build --locked --package containerd-shim-x --package x-manager

# A shim whose worker crashes at the message that a test chooses, and x-manager: together, so that what both depend on is built once.
build-faulty:
	$(CARGO) build --locked --package containerd-shim-x --package x-manager --features containerd-shim-x/fault-injection

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets --features shim-tests/bench -- -D warnings

## an executable is replaced atomically: a process that starts it meanwhile gets the old or the new one
BIN = $(DESTDIR)$(PREFIX)/bin
SHARE = $(DESTDIR)$(PREFIX)/share
install: packages build
	install -D -m 755 $(SHIM) $(BIN)/.containerd-shim-x-v2.new && mv -f $(BIN)/.containerd-shim-x-v2.new $(BIN)/containerd-shim-x-v2
	install -D -m 755 $(MANAGER) $(BIN)/.x-manager.new && mv -f $(BIN)/.x-manager.new $(BIN)/x-manager
	install -D -m 755 $(XCTL) $(BIN)/.xctl.new && mv -f $(BIN)/.xctl.new $(BIN)/xctl
	mkdir -p $(SHARE)/man/man1 $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions $(SHARE)/fish/vendor_completions.d
	$(XCTL) man $(SHARE)/man/man1
	$(XCTL) completion bash > $(SHARE)/bash-completion/completions/xctl
	$(XCTL) completion zsh > $(SHARE)/zsh/site-functions/_xctl
	$(XCTL) completion fish > $(SHARE)/fish/vendor_completions.d/xctl.fish
	install -D -m 644 manager/default.toml $(DESTDIR)$(PREFIX)/share/doc/x-manager/config.toml
	install -D -m 644 manager/systemd/x-manager.socket $(DESTDIR)$(PREFIX)/lib/systemd/system/x-manager.socket
	mkdir -p $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's,@PREFIX@,$(PREFIX),' manager/systemd/x-manager.service > $(DESTDIR)$(PREFIX)/lib/systemd/system/x-manager.service

## what `install` has installed; docs/operations.md lists the steps before that
uninstall:
	rm -f $(BIN)/xctl $(SHARE)/man/man1/xctl.1 $(SHARE)/man/man1/xctl-*.1 $(SHARE)/bash-completion/completions/xctl \
		$(SHARE)/zsh/site-functions/_xctl $(SHARE)/fish/vendor_completions.d/xctl.fish
	rm -f $(BIN)/containerd-shim-x-v2 $(BIN)/x-manager $(DESTDIR)$(PREFIX)/lib/systemd/system/x-manager.socket \
		$(DESTDIR)$(PREFIX)/lib/systemd/system/x-manager.service $(DESTDIR)$(PREFIX)/share/doc/x-manager/config.toml
	rmdir --ignore-fail-on-non-empty $(DESTDIR)$(PREFIX)/share/doc/x-manager

## Debian packages that building and testing need
packages:
	tests/tools/install-packages

## containerd, runc and crun of other Debian releases, and programs that keep images, in a cache folder
suites: packages
	tests/tools/fetch-suites
	tests/tools/fetch-image-tools

## x-manager beside containerd 2.1: memory, start, restart, churn; CONTAINERS=1000 takes some three minutes
bench-manager: CONTAINERS ?= 100
bench-manager: packages suites build bench-tools
	X_SHIM=$(SHIM) X_DAEMON=$(MANAGER) $(CARGO) run --locked --release --package shim-tests --features bench --bin manager-bench -- --containers $(CONTAINERS)

## images of X_BENCH_MIB MiB in 20 layers, stored and unpacked by ctr 1.6 and 2.1 on containerd 2.1 and on x-manager, in turns, into docs/bench-images.md:
## time, memory, State meanwhile, list and collection of 10,000 blobs. X_BENCH_FOLDER is on the disk that is measured. The machine should do nothing else
bench-images: X_BENCH_MIB ?= 1024
bench-images: X_BENCH_FOLDER ?= /var/tmp
bench-images: packages suites build bench-tools
	X_SHIM=$(SHIM) X_DAEMON=$(MANAGER) $(CARGO) run --locked --release --package shim-tests --features bench --bin images-bench -- \
		--mib $(X_BENCH_MIB) --folder $(X_BENCH_FOLDER) > docs/bench-images.md.new
	mv docs/bench-images.md.new docs/bench-images.md

## Docker 28 with its image store on containerd 2.1 and on x-manager, in turns, into docs/bench-docker.md: time of pull, save, load and run, and memory and CPU
## time of the daemon below. Images are of X_BENCH_MIB MiB in 10 layers, in X_BENCH_FOLDER. The machine should do nothing else
bench-docker: X_BENCH_MIB ?= 512
bench-docker: X_BENCH_FOLDER ?= /var/tmp
bench-docker: packages suites build bench-tools
	X_SHIM=$(SHIM) X_DAEMON=$(MANAGER) $(CARGO) run --locked --release --package shim-tests --features bench --bin docker-bench -- \
		--mib $(X_BENCH_MIB) --folder $(X_BENCH_FOLDER) > docs/bench-docker.md.new
	mv docs/bench-docker.md.new docs/bench-docker.md

BENCH = X_SHIM=$(SHIM) $(CARGO) run --locked --release --package shim-tests --features bench --bin shim-bench --

## the stock shim and ours, each with each of its runtimes, in one run under containerd 2.1, into docs/bench.md and docs/bench.svg: time, processor
## time, system calls, output, many execs, memory. Takes half an hour; the machine should do nothing else. BENCHED="…" adds arguments
bench: packages suites build bench-tools
	$(BENCH) --containerd 2.1 --rounds 40 --rest --plot docs/bench.svg --shim go+runc=stock@runc --shim go+crun=stock@crun \
		--shim x+runc=$(SHIM)@runc --shim x+crun=$(SHIM)@crun --shim x+native=$(SHIM)@native $(BENCHED) > docs/bench.md.new
	mv docs/bench.md.new docs/bench.md

## memory of CONTAINERS containers' shims beside the stock shim, then one upgrade of all of ours; and what is left of 100 whose workers rest
bench-memory: CONTAINERS ?= 1000
bench-memory: packages suites build bench-tools
	$(BENCH) --only memory --runtime crun --shim go=stock --shim x=$(SHIM) --containers $(CONTAINERS) --upgrade
	$(BENCH) --only memory --runtime crun --shim x=$(SHIM) --containers 100 --rest

## pods through CRI, without pause containers, beside those with one, of our shim and of the stock one; and what PODS idle ones hold
bench-pods: PODS ?= 100
bench-pods: packages suites build bench-tools
	$(BENCH) --containerd 2.1 --only pods --rounds 40 --containers $(PODS) --rest --shim go+runc=stock@runc --shim go+crun=stock@crun \
		--shim x+native=$(SHIM)@native --shim x+keeper=$(SHIM)@native+keeper --shim x+crun+keeper=$(SHIM)@crun+keeper $(BENCHED)

clean:
	$(CARGO) clean
