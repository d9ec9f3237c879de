# Two commands: `make demo` runs the first study, `make test` the tests.  Both make what they need.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
# torch comes first and pinned, from wherever pip is set up to find it: a resolver that is left to choose takes a build of several gigabytes.
TORCH  ?= torch==2.13.0

.PHONY: demo test check format lock vectors clean

demo: $(VENV)/.installed
	$(BIN)/etude run examples/depth-pruning.yaml

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/etude claims check

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -qq --disable-pip-version-check --constraint requirements.lock --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -qq --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	touch $@

# Write down exactly what is installed now, for everybody after.
lock: $(VENV)/.installed-dev
	$(BIN)/pip freeze --exclude-editable | grep -v '^torch==' > requirements.lock

# The catalogue's vectors, after its texts have changed.
vectors: $(VENV)/.installed-dev
	$(BIN)/python -c 'from etude.papers.vectors import ship; ship()'

clean:
	rm -rf $(VENV) .etude build dist src/*.egg-info
