# Everything runs in .venv, which the first target that needs it creates; no other preparation is necessary.
#   PYTHON=python3.12         the interpreter to create it with (default: the first one found that is new enough)
#   PIP_ARGS='-c constraints.txt'    further arguments for pip: known versions, another index, ...

VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-output
WORKERS ?= 2
# Those that need no files; the others say in their help what they read.
BENCHMARKS ?= $(addprefix benchmarks/measure/,bits_ms.py deploy.py labels.py regularizer.py train_step.py)
PIP_ARGS ?=

# Looked up when an environment is created, not on every run.
PYTHON ?= $(shell for python in python3 python python3.14 python3.13 python3.12 python3.11; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$python; exit; fi; \
	done; echo python3)

PIP_DEFAULT_TIMEOUT ?= 60
PIP_DISABLE_PIP_VERSION_CHECK ?= 1
export PIP_DEFAULT_TIMEOUT PIP_DISABLE_PIP_VERSION_CHECK

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs wheel bench env dev-env
# Two targets at a time would install into the same environment at a time.
.NOTPARALLEL:

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | awk -F'|' '{ printf "  make %-9s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo ## quantize a small Vision Transformer on real images, and show the result as a page in demo-output/
	$(BIN)/qvit demo --out $(OUT)

# One thread per worker: the tests are many small models, and two workers on two cores must not fight for them.
test test-all: export OMP_NUM_THREADS = 1

test: $(VENV)/.dev ## run the tests that are not slow
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal --durations 10

test-all: $(VENV)/.dev ## run every test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 10

lint: $(VENV)/.dev ## check style, format and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

docs: $(VENV)/.dev ## build the documentation in site/; a broken link is an error
	$(BIN)/python -m mkdocs build --strict

wheel: $(VENV)/.created ## build a wheel in dist/, with the native engine compiled: its users need no compiler
	$(BIN)/python -m pip wheel $(PIP_ARGS) --no-deps --wheel-dir dist .

bench: $(VENV)/.demo ## run the benchmarks (BENCHMARKS=FILE for one of them)
	@set -e; for script in $(BENCHMARKS); do echo "$(BIN)/python $$script"; $(BIN)/python $$script; done
	$(BIN)/python benchmarks/render

env: $(VENV)/.demo ## make the environment for using qvit

dev-env: $(VENV)/.dev ## make the environment for developing qvit

# The markers are touched last, so an interrupted installation is taken up again by the next run.
$(VENV)/.created:
	@python='$(PYTHON)'; \
	if ! command -v "$$python" >/dev/null 2>&1; then \
		echo "error: no '$$python' here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; \
	fi; \
	if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "error: qvit needs Python 3.11 or newer, '$$python' is $$("$$python" --version 2>&1); name another: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; \
	fi; \
	if ! "$$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then \
		echo "error: '$$python' cannot create environments (no venv or ensurepip); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	echo "Creating $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.created
	@echo "Installing qvit; the first time this downloads PyTorch and takes a few minutes"
	$(BIN)/python -m pip install $(PIP_ARGS) --editable '.[demo]'
	@touch $@

# A development environment is the other one and more, so it counts as both.
$(VENV)/.dev: pyproject.toml | $(VENV)/.created
	@echo "Installing qvit and its development tools; the first time this downloads PyTorch and takes a few minutes"
	$(BIN)/python -m pip install $(PIP_ARGS) --editable '.[dev]'
	@touch $(VENV)/.demo $@
