# Two commands: make demo, make test. Each sets up .venv first. The demo installs what it runs, the
# tests also install the tools of developers.
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu   torch without CUDA, from that index
#   make demo PIP_ARGS=...                                        more arguments of pip install
VENV ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
# Pinned versions. Python 3.12 and later: constraints-3.13.txt.
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=
READY = $(VENV)/.ready
RUNS = $(VENV)/.runs
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
# One process a core, each with one thread: threads of several processes would wait for each other.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

.PHONY: demo test test-fast lint docs benchmarks dist clean

demo: $(RUNS)
	$(VENV)/bin/sskt demo

test: $(READY)
	$(PYTEST)

test-fast: $(READY)
	$(PYTEST) -m "not slow"

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/mypy

docs: $(READY)
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs build/docs

benchmarks: $(READY)
	$(VENV)/bin/sskt bench --full --out runs/bench

dist: $(READY)
	rm -rf dist
	$(VENV)/bin/python -m build

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("sskt needs Python 3.11 or newer; say make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(RUNS): pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@echo "installing sskt with torch into $(VENV): about 6 GB with CUDA, about 1.5 GB with TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch torchvision)
	$(PIP) $(if $(TORCH_INDEX),,-c $(CONSTRAINTS)) -e '.[lite]'
	touch $@

$(READY): pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) -c $(CONSTRAINTS) -e '.[dev]'
	touch $@ $(RUNS)

clean:
	rm -rf $(VENV) dist build runs *.egg-info
