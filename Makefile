# `make train` trains the main example, `make test` runs every check; each sets up what it needs, once: the first what
# the examples import, the second all that the tests do, into the same .venv.
# `make help` lists all targets.
# Python 3.10 or newer is all that a machine must have. Another one than python3: make train PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Half of a test is imports and waiting: two at once end in little more than half the time, on two cores too.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS)
ONE_DEVICE := tests/framework tests/precision tests/strategies
TYPED := precision strategies framework testing examples benchmarks

.PHONY: help train docs test fast test-xla test-newest test-python test-zoo bench-gpu lint build venv clean

help:  ## lists the targets
	@awk -F ':[^#]*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: .venv/.examples-installed  ## trains the main example; ARGS="--max_steps 100" passes options on, ARGS=--help lists them
	$(BIN)/python examples/gpt.py $(ARGS)

test: lint  ## runs every check but those of XLA and the zoo; ARGS="-k resume" passes options on, WORKERS=0 is one process
	$(BIN)/python $(PYTEST) $(ARGS)

fast: lint  ## lint, and the tests that take less than a few seconds each
	$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-zoo: venv .venv/.zoo-installed  ## tries other people's models; WORKERS=0 ARGS=--write-results renews docs/models.md's figures
	$(BIN)/python $(PYTEST) tests/zoo $(ARGS)

# mkdocstrings reads the package where PYTHONPATH shows it. The notice is about mkdocs's future, and would be printed each time.
docs: .venv/.docs-installed  ## builds the site of docs/ into site/; the first warning fails it. To read it with search: python -m http.server -d site
	PYTHONPATH=.venv/typed NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html"

# Tests that several ranks run, one file of each kind: strategies, checkpoints on other numbers of ranks, collectives.
ON_RANKS := $(addprefix tests/distributed/,test_strategies.py test_resharding.py test_collectives.py)

test-newest: venv .venv-newest/.installed  ## runs the fast tests of one device, and some of several ranks, under the newest torch
	.venv-newest/bin/python $(PYTEST) $(ONE_DEVICE) -m "not slow" $(ARGS)
	.venv-newest/bin/python $(PYTEST) $(ON_RANKS) $(ARGS)

test-python: .venv-python/.installed  ## runs the fast tests of one device under another Python: PYTHON=python3.13
	.venv-python/bin/python tests/other_systems.py darwin
	.venv-python/bin/python $(PYTEST) tests/test_release.py tests/configuration $(ONE_DEVICE) -m "not slow" $(ARGS)

bench-gpu: venv  ## measures tokens/s and MFU, on a machine with a GPU; ARGS=--help lists the options
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# torch_xla fits one torch alone, which is older: an environment of its own, made without accelerators in mind. In it
# the tests of one device run, too, so that the oldest torch that pyproject.toml allows is one that was tried.
test-xla: venv .venv-xla/.installed  ## runs the tests of XLA, and those of one device under the oldest torch
	.venv-xla/bin/python -m pytest tests/xla $(ARGS)
	.venv-xla/bin/python $(PYTEST) $(ONE_DEVICE) -m "not slow" $(ARGS)

# The repository's root is the package, whatever a clone's directory is called, and mypy names modules by directory:
# it is shown the root through a link that has the package's name.
lint: venv  ## ruff, ruff format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	MYPYPATH=.venv/typed $(BIN)/mypy -m stratagem $(TYPED:%=-p stratagem.%)

# What is built is tried as a user would: in an environment and a directory that hold nothing else.
build: .venv/.release-installed  ## builds wheel and sdist into dist/, checks them, and runs the README's program with the wheel
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	tests/environments/try_wheel.sh $(PYTHON) dist/*.whl

venv: .venv/.installed  ## sets up .venv with all that the tests need, once

# A stamp is made last, so a set-up that was cut off is done again.
.venv/.examples-installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "stratagem needs Python 3.10 or newer, not " + sys.version.split()[0] + ". Name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "Setting up .venv with what the examples need: a minute or two, most of it for torch."
	$(PIP) pip
	$(PIP) -e '.[examples]'
	touch $@

# DeepSpeed's set-up imports torch, so it is built when that is there, and not in isolation; nothing is compiled.
.venv/.installed: .venv/.examples-installed
	@echo "Setting up .venv with what the tests need."
	$(PIP) -e . --group dev
	$(PIP) setuptools setuptools-scm wheel ninja py-cpuinfo packaging
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation -e '.[deepspeed]'
	mkdir -p .venv/typed && ln -sfn ../.. .venv/typed/stratagem
	touch $@

.venv/.zoo-installed: .venv/.installed
	$(PIP) -e . --group zoo
	touch $@

.venv/.docs-installed: .venv/.examples-installed
	$(PIP) --group docs
	mkdir -p .venv/typed && ln -sfn ../.. .venv/typed/stratagem
	touch $@

.venv/.release-installed: .venv/.examples-installed
	$(PIP) --group release
	touch $@

.venv-xla/.installed: MADE_OF = xla
.venv-newest/.installed: MADE_OF = newest
.venv-python/.installed: MADE_OF = pinned
.venv-%/.installed: pyproject.toml constraints.txt $(wildcard tests/environments/*)
	rm -rf .venv-$*
	tests/environments/make.sh $(PYTHON) .venv-$* $(MADE_OF)
	touch $@

clean:  ## removes all that was set up and cached; keeps output/, which holds your runs
	rm -rf .venv .venv-* build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
