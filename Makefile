# `make demo` and `make test` each work alone on a machine that has only make and Python 3.10 or newer.
# Everything is installed into .venv, again only when pyproject.toml or the sources of the native launcher have changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := examples/sweep
NATIVE := $(wildcard workers/launcher/native/*.[ch])

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo docs test retest lint format types types-tree coverage faults sweep bench screenshots wheel native sanitize clean compose-passwords compose-test

help:
	@echo "make demo      install the run-time dependencies, run $(DEMO), say where the result is"
	@echo "make test      install the tools, run the tests"
	@echo "make types     mypy --strict         make lint      ruff check and ruff format --check"
	@echo "make coverage  tests with coverage   make bench     the benchmarks"
	@echo "make faults    the fault tests, for docs/guarantees.md"
	@echo "make sweep     every fault at every failpoint of every process"
	@echo "make screenshots   the pictures of docs/pictures"
	@echo "make native    compile the native launcher; any warning is an error"
	@echo "make sanitize  the launchers' tests with the native one under ASan and UBSan"
	@echo "make compose-passwords, make compose-test: docs/compose.md"
	@echo "make docs      the documents as a site, in site/"
	@echo "make wheel     build dist/*.whl      make clean     remove all of this, .venv too"

# The interpreter is a prerequisite by existence only: its date says nothing.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "pilotq needs Python 3.10 or newer, and $(PYTHON) is not: name another with 'make PYTHON=...'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install the Debian package python3-venv." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[report]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev,report,metrics,otel]'
	@touch $@ $(VENV)/demo.stamp

demo: $(VENV)/demo.stamp
	@rm -rf $(DEMO)/results
	cd $(DEMO) && PATH="$(abspath $(BIN)):$$PATH" pilotq run sweep.toml
	@cat $(DEMO)/results/gather.txt
	@echo "The result is in $(DEMO)/results: sweep.png (the plot) and summary.json (the numbers)."

# Most of a test is waiting for processes, so two run at a time; the tests of one file run in the same of the two.
test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The tests that failed last time, if they were few.
retest: $(VENV)/dev.stamp
	@test "$$($(BIN)/python -m pytest --last-failed --last-failed-no-failures none --collect-only -q | grep -c ::)" -le 20
	$(BIN)/python -m pytest --last-failed --last-failed-no-failures none

# The passwords that docker-compose.yml needs, of the server and the dashboard; made once.
compose-passwords:
	@umask 077 && mkdir -p .compose && for name in password dashboard-password; do \
	  test -s .compose/$$name || od -An -N 16 -t x1 /dev/urandom | tr -d ' \n' > .compose/$$name; done
	@echo "The passwords are in .compose: log in to the dashboard as pilotq, with $$(cat .compose/dashboard-password)."

# As root, with a running engine: builds stand-ins for the base images, and brings docker-compose.yml up with them.
compose-test: $(VENV)/dev.stamp
	PILOTQ_TEST_COMPOSE=1 $(BIN)/python -m pytest -rP tests/compose

# mypy cannot see through an editable install: it gets a tree of links that looks like the installed package.
types-tree:
	@rm -rf .types && mkdir -p .types/pilotq
	@ln -s ../../broker ../../workers ../../cli $(addprefix ../../,$(wildcard package/*.py package/py.typed)) .types/pilotq/

types: $(VENV)/dev.stamp types-tree
	MYPYPATH=.types $(BIN)/python -m mypy --strict -p pilotq
	MYPYPATH=.types:integrations/snakemake:integrations/joblib:integrations/submitit:integrations/hyperqueue $(BIN)/python \
	  -m mypy --strict -p snakemake_executor_plugin_pilotq -m hq_pilotq -m joblib_pilotq -m submitit_pilotq

lint: $(VENV)/dev.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(VENV)/dev.stamp
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

coverage: $(VENV)/dev.stamp
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

# Every fault at every failpoint of every process, some 15 minutes; `make test` only kills at each.
sweep: $(VENV)/dev.stamp
	PILOTQ_SWEEP=whole $(BIN)/python -m pytest tests/system/test_fault_sweep.py

# The tests of docs/faults.toml; their results go into docs/guarantees.md.
FAULT_TESTS := \
  tests/system/test_fault_sweep.py \
  tests/system/test_restart.py \
  tests/system/test_network_partition.py \
  tests/system/test_retry_budgets.py \
  tests/system/test_quarantine.py \
  tests/broker/pilot/test_aof_repair.py \
  tests/broker/pilot/test_aof_sync.py \
  tests/chaos/test_judge.py

faults: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -p tests.support.fault_results $(FAULT_TESTS)
	$(BIN)/python docs/generate.py

$(VENV)/docs.stamp: pyproject.toml $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

docs: $(VENV)/docs.stamp
	$(BIN)/python docs/build_site.py

# With the extra `dashboard`, and Chromium.
screenshots: $(VENV)/dev.stamp
	$(BIN)/python -m docs.screenshots

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks $(FIGURES)

# pip compiles it, too, if it can: here one sees why it cannot, and nothing is hidden.
BUILD_NATIVE = $(BIN)/python -W ignore -c 'from setuptools import setup; setup()' --quiet build_ext --inplace --force --build-temp build/native
native: $(VENV)/dev.stamp
	CFLAGS='-Wall -Wextra -Werror' $(BUILD_NATIVE)
	@rm -rf build
	@$(BIN)/python -c 'import pilotq.workers.launcher._native as m; print("built", m.__file__)'

# Leaks are not looked for: an interpreter that ends frees little. What was built before is built again, whatever fails.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1
sanitize: $(VENV)/dev.stamp
	CFLAGS='$(SANITIZE)' $(BUILD_NATIVE)
	@code=0; LD_PRELOAD="$$(cc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/python -m pytest -k '(native or test_plain_launches) and not system_calls' \
	  tests/workers/launcher/test_chain.py tests/workers/launcher/test_plain_launches.py || code=$$?; \
	$(BUILD_NATIVE); rm -rf build; exit $$code

# A build/ of an earlier time would leak modules that were deleted since into the wheel.
wheel: $(VENV)/dev.stamp
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation
	rm -rf build

clean:
	rm -rf .venv .vvuq .integrations .compose .types .site site build integrations/*/build workers/launcher/_native*.so dist *.egg-info .mypy_cache .ruff_cache tests/.ruff_cache .pytest_cache .hypothesis .coverage .coverage.*
	rm -rf $(DEMO)/results $(DEMO)/.pilotq
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
