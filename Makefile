# Two commands a new user needs: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SERVERS ?= .servers

.PHONY: demo test test-slow test-integration servers servers-stop lint install clean

install: $(STAMP)

# torch comes first and pinned, so that nothing else pulls in another build of it.
$(STAMP): pyproject.toml constraints.txt $(wildcard bivlm/kernels/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Say which: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m flows.cli.demo --output demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A file at a time to whichever process is free, in their order: the long ones lie in the middle. Four processes for two
# cores, because half of the time a test waits for a server or a child. One thread each: processes of as many threads as
# there are cores wait for one another, up to seven times as long.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Starts its own servers and workers; PostgreSQL's programs must be installed.
test-integration: $(STAMP)
	$(BIN)/python -m pytest -m integration tests/integration

# PostgreSQL, S3, MLflow and Prefect until Ctrl-C; then `. .servers/env` in other shells.
servers: $(STAMP)
	$(BIN)/python -m infra.servers run --folder $(SERVERS)

servers-stop: $(STAMP)
	$(BIN)/python -m infra.servers stop --folder $(SERVERS)

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
