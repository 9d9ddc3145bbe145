PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS := 1

.PHONY: setup tune test format lint types imports wheel aot bench check

setup: .venv/stamp

.venv/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

tune: setup
	$(BIN)/stree-tune --gpu h100 --dataset gsm8k

test: setup
	$(BIN)/pytest -m "not gpu"

format: setup
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

wheel: setup
	$(BIN)/python tests/wheel_smoke.py

aot: setup
	$(BIN)/python benchmarks/aot.py

bench: setup
	$(BIN)/python benchmarks/lossless.py

check: lint types imports test wheel
