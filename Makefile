# make demo     the whole chain at small size on this machine, 12 minutes on 2 fast cores
# make test     the tests that CI runs            make test-all   all that this machine can run
# make check    style, types, import contract     make unsloth    second environment, for the comparison only
# make soak     training killed 50 times at random moments, compared with a run that nobody killed; about an hour
# make gpu-check   everything that needs a GPU, as a table
# make test-slurm  the cluster scripts on a two-node Slurm, which it installs; test-slurm-short: one job on 2 nodes

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Two test processes with one thread each: torch's own threads on top of them only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --durations 15

.PHONY: install demo test test-all test-slurm test-slurm-short soak gpu-check check format lock unsloth clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: install
	$(BIN)/python launch/demo.py

test: install
	$(PYTEST) -m "not slow and not gpu and not slurm"

test-all: install
	$(PYTEST) -m "not slurm"

# One process: the tests share a cluster.
test-slurm: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slurm tests/integration/test_slurm.py

test-slurm-short: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slurm and not slow" tests/integration/test_slurm.py

soak: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --kills 50

gpu-check: install
	$(BIN)/python launch/gpu_check.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Rewrites the lock from what is installed. `+cpu` and CUDA packages belong to one machine, not to the lock.
lock: install
	{ grep '^#' requirements.lock; \
	  { $(BIN)/pip freeze --exclude-editable; $(BIN)/pip freeze --all | grep '^setuptools=='; } \
	  | grep -vE '^(nvidia|cuda|triton)|@ file' | sed 's/+cpu$$//' | sort -fu; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

# Unsloth patches transformers process-wide and pulls packages that break beside a CPU build of torch, so it has an
# environment of its own, and without a GPU it is installed without dependencies (the lock lists what it needs).
UNSLOTH_BIN := .venv-unsloth/bin
NO_DEPS := $(if $(shell command -v nvidia-smi),,--no-deps)

unsloth: .venv-unsloth/.installed

.venv-unsloth/.installed: requirements-unsloth.lock
	test -x $(UNSLOTH_BIN)/python || $(PYTHON) -m venv .venv-unsloth
	$(UNSLOTH_BIN)/python -m pip install --quiet --upgrade pip
	$(UNSLOTH_BIN)/python -m pip install --quiet $(NO_DEPS) -r requirements-unsloth.lock
	$(UNSLOTH_BIN)/python -c "import unsloth; print('Unsloth', unsloth.__version__, 'in .venv-unsloth')"
	touch $@

clean:
	rm -rf $(VENV) .venv-unsloth build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .import_linter_cache unsloth_compiled_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
