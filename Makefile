# Two commands do everything, each making its own environment where needed:
#   make demo    convert the embedded model, print the report, generate from both models, show both caches
#   make test    the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Every pip call, build environments included, takes the pinned torch.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint check-device clean

demo: $(VENV)/.installed
	$(BIN)/python -m xeco_convert.demo --output demo-output

test: $(VENV)/.tested
	$(BIN)/python -m pytest -n 2 -rs

lint: $(VENV)/.linted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# All device code for every target, with no GPU: what is compiled, spilled and missing. CHECK=--quick, CHECK='sm_90 gfx942'
check-device: $(VENV)/.installed
	scripts/check_device.sh $(BIN)/python $(CHECK)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "xeco-convert needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.linted: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info
