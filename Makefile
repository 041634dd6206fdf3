# make demo: raw frames to samples and a report.   make test: the tests.   Both set up what they need in .venv.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	2>/dev/null && command -v $$p && break; done)
ROOT ?= runs/doom84
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Where torch comes from: make TORCH_INDEX=... for a build of it without CUDA, which is gigabytes smaller.
TORCH_INDEX ?=

.PHONY: demo setup test test-all test-fast lint clean

demo: setup
	$(BIN)/python pipelines/full.py --preset doom84 --root "$(ROOT)"

test: .venv/.ready-test
	$(BIN)/python -m pytest

test-all: .venv/.ready-test
	$(BIN)/python -m pytest -m ""

test-fast: .venv/.ready-test
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

setup: .venv/.ready

# torch comes first and pinned: another package would pull a build of its own choice.
.venv/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "expected Python 3.11, 3.12 or 3.13 with its venv, found none; install it" \
		"(Debian and Ubuntu: apt install python3-venv), or name one with make PYTHON=..."; exit 1; }
	@echo "setting up .venv with $(PYTHON): a few minutes the first time, of which torch takes the most"
	"$(PYTHON)" -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) --editable .
	@touch $@

.venv/.ready-test: .venv/.ready
	$(PIP) --editable '.[test]'
	@touch $@

.venv/.ready-dev: .venv/.ready-test
	$(PIP) --editable '.[test,dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
