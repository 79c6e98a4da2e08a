# Two commands: make demo, make test. Each sets up .venv first.
VENV ?= .venv
PYTHON ?= python3
READY = $(VENV)/.ready
# One process a core, each with one thread: threads of several processes would wait for each other.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

.PHONY: demo test test-fast lint docs benchmarks dist clean

demo: $(READY)
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
	$(VENV)/bin/python benchmarks/label_delivery.py
	$(VENV)/bin/python benchmarks/teacher_stage.py
	$(VENV)/bin/python benchmarks/step.py
	$(VENV)/bin/python benchmarks/images.py
	$(VENV)/bin/python benchmarks/memory.py
	$(VENV)/bin/python benchmarks/server.py

dist: $(READY)
	rm -rf dist
	$(VENV)/bin/python -m build

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("sskt needs Python 3.11 or newer; say make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) dist build runs *.egg-info
