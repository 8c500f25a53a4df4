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
TYPED := precision strategies framework testing examples benchmarks

.PHONY: help train test fast test-xla test-zoo bench-gpu lint venv clean

help:  ## lists the targets
	@awk -F ':[^#]*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: .venv/.examples-installed  ## trains the main example; ARGS="--max_steps 100" passes options on, ARGS=--help lists them
	$(BIN)/python examples/gpt.py $(ARGS)

test: lint  ## runs every check but those of XLA and the zoo; ARGS="-k resume" passes options on, WORKERS=0 is one process
	$(BIN)/python $(PYTEST) $(ARGS)

fast: lint  ## lint, and the tests that take less than a few seconds each
	$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-zoo: venv .venv/.zoo-installed  ## tries other people's models; WORKERS=0 ARGS=--write-results renews docs/models.md's figures
	$(BIN)/python $(PYTEST) tests/zoo $(ARGS)

bench-gpu: venv  ## measures tokens/s and MFU, on a machine with a GPU; ARGS=--help lists the options
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# torch_xla fits one torch alone, which is older: an environment of its own, made without accelerators in mind. In it
# the tests of one device run, too, so that the oldest torch that pyproject.toml allows is one that was tried.
test-xla: venv .venv-xla/.installed  ## runs the tests of XLA, and those of one device under the oldest torch
	.venv-xla/bin/python -m pytest tests/xla $(ARGS)
	.venv-xla/bin/python $(PYTEST) tests/framework tests/precision tests/strategies -m "not slow" $(ARGS)

# The repository's root is the package, whatever a clone's directory is called, and mypy names modules by directory:
# it is shown the root through a link that has the package's name.
lint: venv  ## ruff, ruff format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	MYPYPATH=.venv/typed $(BIN)/mypy -m stratagem $(TYPED:%=-p stratagem.%)

venv: .venv/.installed  ## sets up .venv with all that the tests need, once

# A stamp is made last, so a set-up that was cut off is done again.
.venv/.examples-installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "stratagem needs Python 3.10 or newer, not " + sys.version.split()[0] + ". Name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "Setting up .venv with what the examples need: a minute or two, most of it for torch."
	$(PIP) -e '.[examples]'
	touch $@

# DeepSpeed's set-up imports torch, so it is built when that is there, and not in isolation; nothing is compiled.
.venv/.installed: .venv/.examples-installed
	@echo "Setting up .venv with what the tests need."
	$(PIP) -e '.[dev]'
	$(PIP) setuptools wheel ninja py-cpuinfo packaging
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation -e '.[deepspeed]'
	mkdir -p .venv/typed && ln -sfn ../.. .venv/typed/stratagem
	touch $@

.venv/.zoo-installed: .venv/.installed
	$(PIP) -e '.[zoo]'
	touch $@

.venv-xla/.installed: pyproject.toml constraints.txt tests/xla/requirements.txt tests/xla/make_environment.sh
	rm -rf .venv-xla
	tests/xla/make_environment.sh $(PYTHON) .venv-xla
	touch $@

clean:  ## removes all that was set up and cached; keeps output/, which holds your runs
	rm -rf .venv .venv-xla build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
