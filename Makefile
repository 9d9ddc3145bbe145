PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS := 1

.PHONY: setup tune test format lint types imports wheel aot docs stale newcomer screenshots server-test gpu-test bench sanitize fuzz release-check check

setup: .venv/stamp

.venv/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

tune: setup
	$(BIN)/stree-tune --gpu h100 --dataset gsm8k

# Files stay whole: several share models that take seconds to make.
test: setup
	$(BIN)/pytest -m "not gpu" --numprocesses 2 --dist loadfile

format: setup
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy --follow-imports silent benchmarks/*.py

imports: setup
	$(BIN)/lint-imports

wheel: setup
	$(BIN)/python tests/wheel_smoke.py

aot: setup
	$(BIN)/python benchmarks/aot.py

# The pages of docs that the code says, commands.md and api.md, and what snippets print.
docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/snippets.py

# Results files that are not of this code, and those of the set that are missing.
stale: setup
	$(BIN)/python benchmarks/stale.py

# A newcomer's session, run in a fresh environment and recorded; needs a package index.
newcomer: setup
	$(BIN)/python docs/newcomer.py

# The pictures of the report in docs/images; needs Chromium and pngquant.
screenshots: setup
	$(BIN)/python tests/report_screenshots.py

# Mutated files for every loader, some ten minutes.
fuzz: setup
	$(BIN)/python benchmarks/fuzz.py

# The whole way on a real vLLM server on this CPU; installs it in an environment of its own.
server-test: setup
	$(BIN)/python benchmarks/server_run.py .server-test

# The targets below need a GPU.
gpu-test: setup
	$(BIN)/pytest -m gpu

bench: setup
	$(BIN)/python benchmarks/all.py --gpu

# One case of each kernel and path: the tool runs a program some fifty times slower.
sanitize: setup
	for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest -q -m gpu -k sanitized || exit 1; \
	done

# Everything that a release needs, on a clean clone; needs a package index and some twenty minutes.
release-check: setup
	$(BIN)/python tests/release_check.py $(STEPS)

check: lint types imports test wheel
