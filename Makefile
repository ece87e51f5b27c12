# make demo    install, fetch the embedded model, run configs/eval/demo.yaml
# make test    install with the development tools; lint, formatting, types, tests (what CI runs)
# make clean   remove the virtual environment

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

# Idle threads spin only briefly before they sleep, so that several test processes share few cores.
export GOMP_SPINCOUNT ?= 1000
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test clean

demo: $(VENV)/.installed
	$(BIN)/sparsekv fetch-model smollm2
	$(BIN)/sparsekv eval configs/eval/demo.yaml

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope

# A file that is newer than pyproject.toml says that what it asks for is installed.
$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet -e '.[all]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $(VENV)/.installed $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than Python 3.10; give another: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV)
