# Everything a person needs: make demo, make test. Both make .venv themselves from Python 3.11 or newer.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: install demo test fuzz lint bench clean check

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; set PYTHON=/path/to/python"; exit 2; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(RUN) src/main.py --demo

# Two files at a time: many tests wait for processes more than they compute.
test: install
	$(RUN) -m pytest -n 2 --dist loadfile

# Property tests with examples that no run saw before.
fuzz: install
	$(RUN) -m pytest -n 2 -m hypothesis --hypothesis-profile=fuzz

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

check: lint test

bench: install
	$(RUN) -m bench.wire
	$(RUN) -m bench.slip
	$(RUN) -m bench.overhead
	$(RUN) -m bench.models --quick
	$(RUN) -m bench.sharing --quick

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
