PYTHON ?= python3
JOBS = 1
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: repro setup test lint docs

repro: setup  ## set up, then run the whole pipeline, JOBS cells of the grid at a time
	$(if $(filter 1,$(JOBS)),dvc repro,vqmoe grid --jobs $(JOBS))

setup: .venv/installed  ## install into .venv

.venv/installed: pyproject.toml
	@echo "Installing into .venv: a minute or two, up to 3 GB of downloads"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore .venv/bin/pip install --quiet --editable '.[dev]'
	touch $@

test: lint  ## all tests
	OMP_NUM_THREADS=1 pytest --numprocesses auto --dist loadscope

lint: setup
	ruff check .
	lint-imports

docs: setup  ## the site, in docs/_build; warnings are errors
	sphinx-build --quiet --fail-on-warning --keep-going --conf-dir docs . docs/_build
