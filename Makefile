# Targets create the environment they need in .venv. They require Python >= 3.11, make and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
TESTS ?= tests
SOAK ?=
# Run all tests of a file in one process and in order. Otherwise both processes would create the fixtures of many files.
BY_FILE := --dist loadfile --no-loadscope-reorder

export OMP_NUM_THREADS := 1
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

# Tests and benchmarks run on the CPU. The demo uses GPUs if there are any.
test test-without-ray test-with-ray check check-lowest bench: export DS_ACCELERATOR ?= cpu

.PHONY: demo test test-without-ray test-with-ray check check-lowest fix bench docs clean

demo: .venv/installed  ## train a small model with the whole pipeline, and show its results
	$(BIN)/m2f demo

# Both halves run at the same time, as tests with Ray mostly wait, and to their ends, even if one fails.
# On a very busy machine: make test PYTEST_ADDOPTS=--timeout=1800
test: .venv/installed  ## all tests; SOAK=1 adds the soak tests
	$(MAKE) --no-print-directory --keep-going --jobs 2 test-without-ray test-with-ray

# Status 5: no test was selected, e.g. TESTS is a file of the other half.
test-without-ray:
	$(BIN)/python -m pytest $(TESTS) -n 2 $(BY_FILE) -m "not cluster $(if $(SOAK),,and not soak)" || [ $$? = 5 ]

# This half prints its output when it ends, so that the output of the halves does not mix.
test-with-ray:
	output=$$(mktemp); \
	$(BIN)/python -m pytest $(TESTS) -m "cluster $(if $(SOAK),,and not soak)" > $$output 2>&1; status=$$?; \
	cat $$output; rm $$output; \
	[ $$status = 0 ] || [ $$status = 5 ]

check: .venv/installed  ## lint, spelling, types, import rules and the quick tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell -D - -D docs/banned_words.txt
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(TESTS) -n 2 $(BY_FILE) -q -m "not cluster and not slow and not soak" || [ $$? = 5 ]

# Without tests of weight files and parameter counts, which do not depend on these versions.
check-lowest: .venv/lowest/installed  ## the quick tests of the model with the oldest supported versions
	PYTHONPATH=. .venv/lowest/bin/python -m pytest tests/model -n 2 $(BY_FILE) -q -p no:cacheprovider --ignore tests/model/weights \
		-m "not cluster and not slow and not soak" -k "not row_of_the_paper"

fix: .venv/installed  ## format, and apply the fixes of ruff
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed  ## benchmarks on this machine, small profile
	$(BIN)/python -m benchmarks --tiny

docs: .venv/installed  ## write docs/configuration.md from the settings' docstrings
	$(BIN)/m2f config --explain > docs/configuration.md

clean:  ## remove the environment and caches; runs and data stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[all,test,dev]' --constraint constraints.txt
	touch $@

.venv/lowest/installed: tests/lowest.txt
	$(PYTHON) -m venv .venv/lowest
	.venv/lowest/bin/python -m pip install --quiet --no-cache-dir --no-compile --requirement tests/lowest.txt
	touch $@
