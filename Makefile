# make demo   set up into .venv, run both modes on the built-in model, print the verdict and where the report lies
# make test   set up and run all tests        make check   format, lint, types        make clean   remove .venv
# make docs   build the docs site into site/, which opens from the disk: site/index.html
# make engines   build llama.cpp into .venv too (some minutes, once); its tests then run
# make bench      measure speed beside peers into docs/performance.md (some minutes, alone)  make bench-quick   CI's part
# make bench-scale   the long part of it: prompts of 32,768 tokens, 10 and 16 million records (half an hour, alone)
# make accuracy   measure error rates on planted faults and benign variations; goes on where it was stopped
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Versions are pinned here alone; the package itself accepts wide ranges.
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.23.0
LLAMA_CMAKE ?= -DGGML_NATIVE=OFF
# What was built is kept, by what it was built with, and found again by the next checkout.
WHEELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/driftprobe/pip-$(shell printf %s "$(LLAMA_CMAKE)" | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.ready

.PHONY: demo test check clean docs setup engines calibrate accuracy bench bench-quick bench-scale
setup: $(STAMP)

$(STAMP): pyproject.toml Makefile hatch_build.py include/driftprobe.h $(wildcard src/driftprobe/*.[ch])
	@echo "setting up $(VENV) (once; a minute or two)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: driftprobe needs Python 3.10 or later; call make with PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "$(TRANSFORMERS)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[hf,dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/driftprobe run --model builtin:tiny --mode both

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

# Not for this very processor: a build for any one compares with others, and GCC 12 breaks llama.cpp's AMX code (SIGILL).
engines: $(STAMP)
	CMAKE_ARGS="$(LLAMA_CMAKE)" $(BIN)/python -m pip install --quiet --disable-pip-version-check --cache-dir "$(WHEELS)" --editable ".[llamacpp]"

check: $(STAMP)
	$(BIN)/ruff format --check src tests tools benchmarks
	$(BIN)/ruff check src tests tools benchmarks
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # not --quiet: it would let warnings pass
	@echo "site/index.html"

calibrate: $(STAMP)
	$(BIN)/python tools/calibrate_limit.py

accuracy: $(STAMP)
	$(BIN)/python -m benchmarks.accuracy

bench: $(STAMP)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[bench]"
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed

bench-scale: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed --only long scale

bench-quick: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed --quick

clean:
	rm -rf $(VENV) build dist site
