# Eight verbs. Each makes the environment it needs in .venv; only Python (>= 3.11), make and a C++ compiler must be there.
PYTHON ?= python3
BIN := .venv/bin
TESTS ?= tests
SOAK ?=
# The tests of a file run in one process, in their order: else both processes make the fixtures of many files.
BY_FILE := --dist loadfile --no-loadscope-reorder

export OMP_NUM_THREADS := 1
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

# The tests are made for CPUs; a demo uses the GPUs that are there.
test check check-lowest bench: export DS_ACCELERATOR ?= cpu

.PHONY: demo test check check-lowest fix bench docs clean

demo: .venv/installed  ## train a small model through the whole chain and show that it learned
	$(BIN)/m2f demo

# Both halves run whatever the first one finds. 5: nothing was selected, as where TESTS names a file of the other half.
# On a busy machine: make test PYTEST_ADDOPTS=--timeout=1200
test: .venv/installed  ## every test; SOAK=1 adds the long proofs
	failed=0; \
	$(BIN)/python -m pytest $(TESTS) -n 2 $(BY_FILE) -m "not cluster $(if $(SOAK),,and not soak)" || [ $$? = 5 ] || failed=1; \
	$(BIN)/python -m pytest $(TESTS) -m "cluster $(if $(SOAK),,and not soak)" || [ $$? = 5 ] || failed=1; \
	exit $$failed

check: .venv/installed  ## lint, spelling, types, import rules and the quick tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell -D - -D docs/banned_words.txt
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(TESTS) -n 2 $(BY_FILE) -q -m "not cluster and not slow and not soak" || [ $$? = 5 ]

# Without files of weights and counts of parameters, which these versions do not change.
check-lowest: .venv/lowest/installed  ## the quick tests of the model with the oldest versions of its packages
	PYTHONPATH=. .venv/lowest/bin/python -m pytest tests/model -n 2 $(BY_FILE) -q -p no:cacheprovider --ignore tests/model/weights \
		-m "not cluster and not slow and not soak" -k "not row_of_the_paper"

fix: .venv/installed  ## format and repair what ruff can
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
