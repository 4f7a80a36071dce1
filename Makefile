# Everything a developer does here. Each target builds what it needs: the virtual environment
# .venv, the package in it (release build, editable), and the requirements of an extra. What has
# not changed is not done again.
#
# The lanes of `make test` are told in CONTRIBUTING.md.

SHELL := /bin/bash -o pipefail
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:

# The interpreter of .venv, used when that is made.
PYTHON ?= $(shell ci/find-python)
# The interpreters of the lanes without and with the GIL that are compared.
FREE_THREADED_PYTHON ?= $(shell ci/free-threaded)
GIL_PYTHON ?= $(shell ci/build-cpython gil)
# Options for every Cargo command that reads the lock file, such as --locked or --offline.
CARGO_FLAGS ?=
# Options for every pytest run, such as -x or -k NAME.
PYTEST_FLAGS ?=
# What one pytest run may take. Tests have limits of their own; this one holds when a hang is where
# those are not, such as in a fixture after a failure, and prints the stacks of all threads too.
PYTEST_LIMIT ?= 15m
# How long `make fuzz` looks.
FUZZ_SECONDS ?= 60
# Seed of the random yields in the perturbation lanes.
SEED ?= 1

# PYTHON_GIL=0 from outside would hide that the module does not allow free threading.
unexport PYTHON_GIL

ROOT := $(CURDIR)
PYTEST := -m pytest $(PYTEST_FLAGS)
LIMITED := timeout --foreground --signal=ABRT --kill-after=30 $(PYTEST_LIMIT)
PIP_INSTALL := -m pip --disable-pip-version-check install --quiet
# Validating build of .venv's interpreter, and that of the free-threaded one.
VALIDATING := $(ROOT)/target/validating
FREE_THREADED := $(ROOT)/target/free-threaded

RUST := Cargo.toml $(wildcard Cargo.lock) $(shell find crates -name '*.rs' -o -name Cargo.toml)
PACKAGE := pyproject.toml $(shell find python -name '*.py' -o -name '*.pyi' -o -name '*.yaml' -o -name py.typed)
CORE_TESTS := --workspace --exclude charioteer-python

##@ Use
.PHONY: build demo
build: .venv/stamps/build ## The package, release build, in .venv; PYTHON= chooses the interpreter
demo: build .venv/stamps/demo ## The main job: Gaussian-process classification as one task graph
	.venv/bin/charioteer demo

##@ Test
.PHONY: test test-rust test-loom test-python test-perturb test-release test-ft test-tsan
test: test-rust test-loom test-python test-perturb test-release test-ft ## All lanes below

test-rust: ## Rust tests, doctests and examples, state validator on; again under perturbation
	cargo test $(CARGO_FLAGS) $(CORE_TESTS)
	CHARIOTEER_PERTURB=$(SEED) cargo test $(CARGO_FLAGS) $(CORE_TESTS) --lib --tests

# Models run far too long unoptimized. They live in the library, in modules with loom in their name:
# other tests are compiled too and would pass for models. Where no test is chosen Cargo is content, so
# it is asked.
test-loom: export RUSTFLAGS := --cfg loom
test-loom: export LOOM_MAX_PREEMPTIONS ?= 3
test-loom: LOOM := cargo test $(CARGO_FLAGS) -p charioteer --lib --profile validate \
	--target-dir target/loom
test-loom: ## loom's models of the runtime's protocols
	$(LOOM) loom -- --list | grep 'loom.*: test$$' >/dev/null || { echo 'test-loom: there is no model'; exit 1; }
	$(LOOM) loom

test-python: .venv/stamps/validating .venv/stamps/test ## The Python suite on a validating build
	PYTHONPATH=$(VALIDATING)/site $(LIMITED) .venv/bin/python $(PYTEST) -m 'not surface'

test-perturb: .venv/stamps/validating .venv/stamps/test ## The same under random yields (SEED=), and with one worker
	CHARIOTEER_PERTURB=$(SEED) PYTHONPATH=$(VALIDATING)/site \
		$(LIMITED) .venv/bin/python $(PYTEST) -m 'not stress and not surface'
	CHARIOTEER_WORKERS=1 CHARIOTEER_PERTURB=$(SEED) PYTHONPATH=$(VALIDATING)/site \
		$(LIMITED) .venv/bin/python $(PYTEST) -m 'not stress and not surface'

test-release: build .venv/stamps/test ## The same on the release build
	$(LIMITED) .venv/bin/python $(PYTEST)

test-ft: .venv-ft/stamps/validating ## The same on a free-threaded interpreter; again with threads that share a runtime
	PYTHONPATH=$(FREE_THREADED)/site .venv-ft/bin/python -W error -c \
		'import sys, charioteer; sys.exit(sys._is_gil_enabled() and "test-ft: the GIL is on")'
	PYTHONPATH=$(FREE_THREADED)/site $(LIMITED) .venv-ft/bin/python $(PYTEST)
	PYTHONPATH=$(FREE_THREADED)/site $(LIMITED) .venv-ft/bin/python $(PYTEST) \
		-m 'not stress and not surface' --parallel-threads=4 --skip-thread-unsafe=true

# The options are unstable, and RUSTC_BOOTSTRAP lets a stable compiler take them. With --target they
# reach no build script. Left out are the large tests, those with locks of the standard library around
# data of their own, and those with scoped threads that nobody joins.
test-tsan: export RUSTC_BOOTSTRAP := 1
test-tsan: export RUSTFLAGS := -Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer \
	--cfg tsan --cfg crossbeam_sanitize_thread
test-tsan: export TSAN_OPTIONS := suppressions=$(ROOT)/ci/tsan-suppressions
test-tsan: TESTS := $(filter-out data domain memory random scale,$(basename $(notdir $(wildcard crates/charioteer/tests/*.rs))))
test-tsan: ## The core's tests under ThreadSanitizer; not part of `make test`
	cargo test $(CARGO_FLAGS) -p charioteer --lib $(TESTS:%=--test %) --target-dir target/tsan \
		--target $(shell rustc -vV | sed -n 's/^host: //p') -- \
		--skip spawning_races_with_closing --skip cancelling_races_with_a_named_spawn

.PHONY: fuzz
fuzz: build .venv/stamps/fuzz ## Looks for graph files that are misread, for FUZZ_SECONDS; not part of `make test`
	@mkdir -p target/fuzz
	.venv/bin/python tests/fuzz_graph_files.py target/fuzz/graph_files -max_len=2048 -timeout=10 \
		-artifact_prefix=target/fuzz/ -max_total_time=$(FUZZ_SECONDS)

##@ Measure
.PHONY: bench bench-rust bench-peers bench-overhead bench-gil bench-devices bench-policies bench-metg bench-graphs bench-ft study
bench: bench-rust bench-peers bench-overhead bench-gil bench-devices bench-policies bench-metg bench-graphs bench-ft ## All benchmarks below

bench-rust: build ## Criterion benchmarks of the core
	@mkdir -p benchmarks/results
	.venv/bin/python benchmarks/core.py $(CARGO_FLAGS) --json benchmarks/results/core.json

bench-peers: build ## The core's peers, Taskflow and StarPU, as far as they are installed
	@mkdir -p benchmarks/results
	.venv/bin/python benchmarks/peers/taskflow/run.py --json benchmarks/results/taskflow.json
	.venv/bin/python benchmarks/peers/starpu/run.py --json benchmarks/results/starpu.json

bench-overhead: build .venv/stamps/bench ## What a task costs, beside other runtimes
	@mkdir -p benchmarks/results
	.venv/bin/charioteer bench overhead --json benchmarks/results/overhead.json

bench-gil: build .venv/stamps/bench ## What the GIL costs tasks, beside other runtimes
	@mkdir -p benchmarks/results
	.venv/bin/charioteer bench gil --json benchmarks/results/gil.json \
		--report benchmarks/results/gil.html

bench-devices: build .venv/stamps/bench ## What a task over several devices costs, beside Ray
	@mkdir -p benchmarks/results
	.venv/bin/charioteer bench multi-device --json benchmarks/results/multi-device.json

bench-metg: build .venv/stamps/bench ## The smallest tasks that run efficiently, beside other runtimes
	@mkdir -p benchmarks/results
	.venv/bin/charioteer bench metg --json benchmarks/results/metg.json

bench-graphs: build ## Runs of every pattern of task graph, proved right
	@mkdir -p benchmarks/results
	.venv/bin/charioteer bench graphs --json benchmarks/results/graphs.json

study: build .venv/stamps/bench ## Every benchmark, and one report of them, in target/study
	.venv/bin/charioteer study --out target/study

bench-policies: build .venv/stamps/bench ## How good the schedules of each policy are, in simulated time
	@mkdir -p benchmarks/results
	.venv/bin/charioteer bench policies --json benchmarks/results/policies.json

bench-ft: .venv-gil/stamps/build .venv-ft/stamps/build ## An empty task without the GIL and with it
	@mkdir -p benchmarks/results
	.venv-gil/bin/charioteer bench overhead --only free-threading --peers none \
		--other-python .venv-ft/bin/python --json benchmarks/results/free-threading.json

##@ Keep in order
.PHONY: lint format clean help
# Stubs are compared with the module, so that must be built. Code for release builds alone is out
# of sight of a lint in the development profile. Cargo keeps a target directory of its own here,
# since PyO3 would be built anew at each turn between a lint and maturin.
lint: LINT := CARGO_TARGET_DIR=$(ROOT)/target/lint PYO3_PYTHON=$(ROOT)/.venv/bin/python
lint: build .venv/stamps/dev ## Formatting, lints, types, stubs, documentation; changes nothing
	cargo fmt --all --check
	$(LINT) cargo clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings
	$(LINT) cargo clippy $(CARGO_FLAGS) --workspace --release -- -D warnings
	$(LINT) RUSTDOCFLAGS='-D warnings' cargo doc $(CARGO_FLAGS) --workspace --no-deps
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	MYPYPATH=python .venv/bin/python -m mypy.stubtest charioteer._core

format: .venv/stamps/dev ## Format all sources in place
	cargo fmt --all
	.venv/bin/ruff check --fix-only
	.venv/bin/ruff format

clean: ## Remove all that was built here; cached interpreters stay
	rm -rf target dist .venv .venv-ft .venv-gil .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find python tests examples -name __pycache__ -prune -exec rm -rf {} +
	rm -f python/charioteer/_core.*.so

help: ## This list
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Virtual environments. Stamps lie within them, so that whoever removes one starts afresh.

.venv/stamps/venv:
	$(if $(PYTHON),,$(error no CPython 3.11 or newer on PATH; say PYTHON=))
	$(PYTHON) -m venv .venv
	@mkdir -p $(@D) && touch $@

.venv/stamps/build: .venv/stamps/python $(RUST) pyproject.toml
	VIRTUAL_ENV=$(ROOT)/.venv .venv/bin/maturin develop --release $(CARGO_FLAGS)
	@touch $@

# The build backend and what the package needs at run time; the others add an extra each.
.venv/stamps/python: .venv/stamps/venv pyproject.toml ci/requirements
	.venv/bin/python ci/requirements build | .venv/bin/python $(PIP_INSTALL) -r /dev/stdin
	@touch $@

.venv/stamps/test: EXTRAS := test test-native
.venv/stamps/demo .venv/stamps/test .venv/stamps/bench .venv/stamps/dev .venv/stamps/fuzz: .venv/stamps/python
	.venv/bin/python ci/requirements $(or $(EXTRAS),$(@F)) | .venv/bin/python $(PIP_INSTALL) -r /dev/stdin
	@touch $@

.venv/stamps/validating: .venv/stamps/python $(RUST) $(PACKAGE) ci/build-validating
	ci/build-validating .venv/bin/python $(VALIDATING) $(CARGO_FLAGS)
	@touch $@

# Free-threaded, and its counterpart with the GIL. PyO3 refuses the free-threaded 3.13, which CPython
# calls an experiment: right for users, whose wheels begin with 3.14t, and overridden for our lane.
# Packages come as wheels or not at all: pip would build the newest that has none, for an hour. But for
# PyYAML, which Dask needs and which has no wheel for the free-threaded 3.13: it builds in seconds.
ft_override = $(shell .venv-ft/bin/python -c \
	'import sys; print("UNSAFE_PYO3_SKIP_VERSION_CHECK=1" if sys.version_info < (3, 14) else "")')

.venv-ft/stamps/python: pyproject.toml ci/requirements
	$(if $(FREE_THREADED_PYTHON),,$(error no free-threaded interpreter))
	$(FREE_THREADED_PYTHON) -m venv .venv-ft
	.venv-ft/bin/python ci/requirements build test | \
		.venv-ft/bin/python $(PIP_INSTALL) --only-binary :all: --no-binary pyyaml -r /dev/stdin
	@mkdir -p $(@D) && touch $@

.venv-ft/stamps/validating: .venv-ft/stamps/python $(RUST) $(PACKAGE) ci/build-validating
	$(ft_override) ci/build-validating .venv-ft/bin/python $(FREE_THREADED) $(CARGO_FLAGS)
	@touch $@

.venv-ft/stamps/build: .venv-ft/stamps/python $(RUST) pyproject.toml
	$(ft_override) VIRTUAL_ENV=$(ROOT)/.venv-ft .venv-ft/bin/maturin develop --release \
		--target-dir $(FREE_THREADED) $(CARGO_FLAGS)
	@touch $@

.venv-gil/stamps/build: pyproject.toml ci/requirements $(RUST)
	$(if $(GIL_PYTHON),,$(error no interpreter to compare the free-threaded one with))
	$(GIL_PYTHON) -m venv .venv-gil
	.venv-gil/bin/python ci/requirements build | .venv-gil/bin/python $(PIP_INSTALL) -r /dev/stdin
	VIRTUAL_ENV=$(ROOT)/.venv-gil .venv-gil/bin/maturin develop --release \
		--target-dir $(ROOT)/target/gil $(CARGO_FLAGS)
	@mkdir -p $(@D) && touch $@
