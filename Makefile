# make demo   make test   make check   make oldest   make newest   make sanitize   make mutants   make clean
# Each makes .venv when it is missing. VENV=PATH names an environment of your own: it keeps its torch and its versions.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist worksteal
TORCH := torch==2.13.0

ifeq ($(origin VENV),file)
CONSTRAINTS := -c constraints.txt
endif

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f 2>/dev/null)
.PHONY: demo test check oldest newest releases versions sanitize mutants clean

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.installed-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Both ends of what pyproject.toml allows, in fresh environments: its lower bounds exactly, and the newest releases below
# its caps. They take the native extension that $(VENV) built beside the sources. The oldest numpy and pyarrow have no
# wheels for Python 3.12 and newer: make oldest PYTHON=python3.11.
BOUNDS := $(shell sed -n '/^dependencies/,/^]/p; /^lora/p' pyproject.toml | grep -o '"[^"]*>=[^"]*"' | grep -v 'torch\|triton')
RELEASES := tests/engine/test_releases.py tests/engine/test_lora_runs.py tests/models/test_native.py tests/test_cli.py
PINS_oldest := $(shell echo '$(BOUNDS)' | sed 's/>=\([^,"]*\)[^"]*/==\1/g')

oldest newest: $(VENV)/.installed-test
	rm -rf .venv-$@
	FASTALIGN_CPP=0 $(MAKE) releases VENV=.venv-$@ PINS='$(PINS_$@)'

releases: $(VENV)/.installed-releases
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) $(RELEASES)

versions:  # the newest releases of the libraries whose names and signatures we depend on
	@$(BIN)/python -m pip install --disable-pip-version-check --dry-run --no-deps --ignore-installed \
	  $(foreach name,transformers datasets peft,$(filter "$(name)%,$(BOUNDS))) | sed -n 's/^Would install //p'

# The native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, on a build of their own. Python itself is
# not instrumented: the runtime is preloaded, and its leak reports, which would be the interpreter's, are off.
SANITIZED := build/sanitize
SANITIZER := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
NATIVE_TESTS := ops/test_cpp ops/test_rows ops/test_product ops/test_policy_loss ops/test_divergence ops/test_scan \
  ops/test_attention ops/test_attention_cpp models/test_native

sanitize: $(VENV)/.installed-test
	CXX="g++ $(SANITIZER)" FASTALIGN_CPP=1 FASTALIGN_CUDA=0 $(BIN)/python setup.py -q build --build-lib $(SANITIZED)
	cd $(SANITIZED) && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider \
	  -k "not interpreter and not triton and not environment" $(NATIVE_TESTS:%=$(CURDIR)/tests/%.py)

mutants: $(VENV)/.installed-test  # faults made on purpose: each must turn a test red
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v -n 0 tests/ops/test_mutants.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks fastalign/_C*.so
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "fastalign needs Python 3.10 or newer, $(PYTHON) is %d.%d: run make PYTHON=/path/to/python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# torch comes first, spelled exactly so: any other spelling may resolve to a build that brings gigabytes of CUDA packages.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) $(TORCH)
	@touch $@

$(VENV)/.installed-demo: EXTRAS :=
$(VENV)/.installed-test: EXTRAS := [test,peers,select]
$(VENV)/.installed-check: EXTRAS := [check]
# A compiler's warning fails our own checks, and never a user's build.
$(VENV)/.installed-check: export FASTALIGN_WERROR := 1
$(VENV)/.installed-releases: EXTRAS := [test,lora]
$(VENV)/.installed-%: $(SOURCES) | $(VENV)/.torch
	$(PIP) $(CONSTRAINTS) $(PINS) -e '.$(EXTRAS)'
	@touch $@
