# Two commands set everything up on a fresh machine: `make quickstart` and `make test`.
# Every path is relative and every tool is called through .venv/bin/python, so the clone may lie anywhere.

PYTHON ?= python3
ARGS ?=

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input --quiet install -c constraints.txt

# A virtual environment works only where it was made. It is made anew when it was moved or when its Python is gone.
VENV_WORKS := $(shell [ "$$(cat .venv/made-in 2>/dev/null)" = "$$(pwd -P)" ] && $(PY) -c "" 2>/dev/null && echo yes)

.DEFAULT_GOAL := help
.PHONY: help quickstart dev release-check test test-faults test-cluster test-gpu gpu-once docs check check-format check-lint check-types check-imports clean FORCE

help:
	@echo "make quickstart   set up .venv and train the main example"
	@echo "make dev          set up .venv with an editable install and every development tool"
	@echo "make test         make dev, then run the tests; choose some with ARGS='tests/parallel -k halo'"
	@echo "make test-faults  make dev, then kill, freeze, fill and damage real trainings, and look at what is left"
	@echo "make test-cluster make dev, then train on several hosts, which are network namespaces of this machine (as root)"
	@echo "make test-gpu     make dev, then test the kernels on this machine's GPU"
	@echo "make gpu-once     make dev, then all that only a GPU tells, in 8 minutes, into build/gpu-once.json; small where there is none"
	@echo "make check        make dev, then check format, lint, types and the import contracts"
	@echo "                  one of them: make check-format, check-lint, check-types, check-imports"
	@echo "make docs         make dev, then build the reference into build/docs and check the links of all pages"
	@echo "make release-check  make dev, then build wheel and sdist, and train with the wheel in an empty environment"
	@echo "make clean        remove build output and caches; .venv and runs stay"
	@echo "Another Python:   make PYTHON=/path/to/python3 dev"

# An environment that has the development tools has everything that the quickstart needs.
quickstart: $(if $(wildcard .venv/installed-dev),.venv/installed-dev,.venv/installed-run)
	@$(PY) -m longreach train quickstart

dev: .venv/installed-dev
	@echo ".venv is ready: . .venv/bin/activate"

# Two at a time, each file by one worker, as its tests share fixtures; ARGS='-n 0' for one at a time.
test: .venv/installed-dev
	@$(PY) -m pytest --ignore=tests/faults --ignore=tests/cluster -n 2 --dist loadfile $(ARGS)

test-faults: .venv/installed-dev
	@$(PY) -m pytest tests/faults $(ARGS)

test-cluster: .venv/installed-dev
	@$(PY) -m pytest tests/cluster -rs $(ARGS)

# The tests that are skipped without a GPU, one process per core: compiling the kernels takes most of the time.
test-gpu: .venv/installed-dev
	@$(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { \
		echo "no GPU that torch can use; make test checks the GPU kernels as far as one can without" >&2; exit 2; }
	@$(PY) -m pytest tests/kernels/test_triton_*.py tests/kernels/test_tilings.py -m skipif \
		-n $$(nproc) --dist worksteal $(ARGS)

gpu-once: .venv/installed-dev
	@tests/gpu/once.sh $(ARGS)

check: check-format check-lint check-types check-imports

check-format: .venv/installed-dev
	@$(PY) -m ruff format --check .

check-lint: .venv/installed-dev
	@$(PY) -m ruff check .

# A link gives the package its name, whatever the clone's directory is called.
check-types: .venv/installed-dev
	@mkdir -p .venv/links/package
	@ln -sfn ../../.. .venv/links/package/longreach
	@found=$$($(PY) -m mypy) && status=0 || status=$$?; \
		printf '%s\n' "$$found" | sed 's|^\.venv/links/package/longreach/||'; exit $$status

# Without an __init__.py beside them, every layer is a package of its own, `kernels` among them.
check-imports: .venv/installed-dev
	@mkdir -p .venv/links/layers/longreach
	@for layer in launch framework parallel kernels _aliases.py bounds.py errors.py; do \
		ln -sfn "../../../../$$layer" ".venv/links/layers/longreach/$$layer" || exit 1; done
	@PYTHONPATH=.venv/links/layers .venv/bin/lint-imports --no-logo --cache-dir .import_linter_cache

docs: .venv/installed-dev
	@$(PY) docs/build.py

release-check: .venv/installed-dev
	@$(PY) tests/release.py $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Written last, so that an interrupted set-up is taken up again. An environment that the user made is kept and used.
.venv/made-in: $(if $(VENV_WORKS),,FORCE)
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "PYTHON=$(PYTHON) was not found; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
		echo "PYTHON=$(PYTHON) is older than 3.10; name a newer one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c "import ensurepip, venv" 2>/dev/null || { \
		echo "PYTHON=$(PYTHON) cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@if [ -e .venv/made-in ] || ! $(PY) -c "import pip, sys; sys.exit(sys.version_info < (3, 10))" 2>/dev/null; then \
		echo "making .venv with $$("$(PYTHON)" --version) ..."; \
		"$(PYTHON)" -m venv $$([ ! -e .venv/made-in ] || echo --clear) .venv; fi
	@pwd -P > .venv/made-in

.venv/installed-run: .venv/made-in pyproject.toml constraints.txt
	@echo "installing longreach into .venv: pip, which is quiet, downloads torch, triton, DeepSpeed and smaller packages"
	@echo "(about 2 minutes the first time, more where torch brings the CUDA libraries) ..."
	@$(PIP) -e .
	@touch .venv/installed-run

.venv/installed-dev: .venv/made-in pyproject.toml constraints.txt
	@echo "installing longreach and its development tools into .venv: pip, which is quiet, downloads torch, triton, DeepSpeed,"
	@echo "transformers and smaller packages (about 2 minutes the first time, more where torch brings the CUDA libraries) ..."
	@$(PIP) -e ".[dev]"
	@touch .venv/installed-run .venv/installed-dev
