# One virtual environment, installed once and again only when pyproject.toml or the constraints change.
#   make quickstart            the main job, small, on real text
#   make test                  every test (PYTEST="-m 'not long'" for the short ones)
#   make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
PYTEST ?=
WORKDIR ?= runs/quickstart

# 3.11 is the last Python of the older pair of jax and flax; every newer one takes the newer pair
PAIR := $(shell $(PYTHON) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")')
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/$(PAIR).txt

.PHONY: quickstart test lint format bench clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/t5g2 sweep --sweep=experiments/quickstart.py --workdir=$(WORKDIR)

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest $(PYTEST)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed-dev
	for file in bench/*.py; do $(VENV)/bin/python $$file || exit 1; done

clean:
	rm -rf $(VENV) runs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"t5g2 needs Python 3.11 or newer; $(PYTHON) is {v.major}.{v.minor}. Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints/$(PAIR).txt
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[test,dev]'
	@touch $@
