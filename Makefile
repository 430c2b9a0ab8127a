# Every target sets up what it needs in .venv by itself; only make and a Python >= 3.10 with pip are assumed.
#   make demo ARGS="--steps 10"       make test ARGS="-k permute"       make demo PYTHON=/path/to/python

.PHONY: help demo test lint check matrix mutants kernels bench docs wheel clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

BIN := .venv/bin
# -qq: errors only.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
ARGS ?=

# The first interpreter that runs, is new enough and can make environments: a name on PATH may be an empty shim.
PYTHON ?= $(shell for p in python3.11 python3.14 python3.13 python3.12 python3.10 python3; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)

help:
	@echo "make demo     train a small Mixture-of-Experts language model on this Python's own source"
	@echo "make test     run the test suite"
	@echo "make check    lint, formatting and types, then the test suite (make lint: without the suite)"
	@echo "make matrix   run the suite's core with the oldest and newest torch and Transformers (environments of many GB)"
	@echo "make mutants  break the ops on purpose and show that the suite notices"
	@echo "make bench    time operators and expert MLP against the published ones (quarter of an hour; out/bench)"
	@echo "make kernels  compile the GPU kernels without a GPU: registers, spills, access widths"
	@echo "make docs     build the docs site into out/site (ARGS=serve: show it at localhost, and again at every change)"
	@echo "make wheel    build dist/moekit-*-py3-none-any.whl"
	@echo "make clean    remove .venv and everything built"

demo: .venv/ready-demo
	$(BIN)/moekit demo $(ARGS)

# By file, because a file's tests share the kernels that they compile; one more than two cores, as tests of ranks also wait.
# Modules are compiled once, whatever the environment says, not again by each of the hundred processes that tests start.
test: .venv/ready-dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint test

# Offline: to machine code for sm_80, sm_90, sm_100 and gfx942, on a machine without a GPU.
kernels: .venv/ready-dev
	$(BIN)/python -m moekit.kernels.triton.offline $(ARGS)

matrix: .venv/ready-dev
	$(BIN)/python tests/matrix.py $(ARGS)

mutants: .venv/ready-dev
	$(BIN)/python tests/mutants.py $(ARGS)

bench: .venv/ready-dev .venv/peers/ready
	$(BIN)/python benchmarks/ops.py $(ARGS)
	$(BIN)/python benchmarks/experts.py $(ARGS)

# Strictly: a link or an anchor that leads nowhere is an error.
docs: .venv/ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(if $(ARGS),$(ARGS),build --strict)

# Built by pip in a small environment of its own, which it makes and removes: hatchling and nothing else.
wheel:
	@test -n "$(PYTHON)" || { echo "moekit needs Python >= 3.10 with pip: none found on PATH" >&2; exit 1; }
	@$(PYTHON) -m pip --disable-pip-version-check -qq wheel --no-deps --wheel-dir dist . && ls -l dist/*.whl

clean:
	rm -rf .venv build dist out .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The demo's set-up leaves out the test tools, the type checker, transformers and triton: half the size.
.venv/ready-demo: EXTRAS := cpu,cli
.venv/ready-dev: EXTRAS := dev
.venv/ready-%: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing moekit[$(EXTRAS)] into .venv (a minute or two, once) ..."
	@$(PIP) install --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

# Only compared with, never depended on: the benchmarks skip what is missing, and say so.
.venv/peers/ready: | $(BIN)/pip
	@$(PIP) install --no-deps --target .venv/peers nemo-automodel megatron-core && touch $@ || \
		echo "The peers could not be installed; the benchmarks run without them." >&2

# Distributions that ship venv without ensurepip need the second line.
$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "moekit needs Python >= 3.10 with venv: none found on PATH" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --without-pip --clear .venv && \
		$(PYTHON) -m pip --python .venv/bin/python install -qq pip; }
