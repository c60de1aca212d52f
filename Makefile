# `make` alone lists what there is. `make demo` and `make test` set up what they need.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
ifneq ($(words $(VENV)),1)
$(error VENV: found a blank in '$(VENV)', which make cannot handle: name another folder)
endif
BIN := $(VENV)/bin
RUN := AXOLOTL_DO_NOT_TRACK=1 $(BIN)/python

RECIPE ?= recipes/tiny_line_sealc.yml
MODEL ?= recipes/tiny
TASK ?= line
BACKEND ?= hf
RESULTS ?= results
LENGTHS ?=
SAMPLES ?= 50
ADAPTER ?= outputs/tiny_line_sealc
OUT ?= $(patsubst %/,%,$(ADAPTER))_merged
INTO ?= auto
TOKENS ?= 1900
SEEDS ?= 0 1 2
STUDY_MODEL ?= models/smollm2-135m
KILLS ?= 50
BENCH_TOKENS ?= 8192 31000 65536 131072

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-all test train data eval report merge recipes recipes-smoke study probes bench bench-data bench-gpu chaos lock lint tiny-model

help: ## list the targets and their variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## make a virtual environment in .venv and install everything into it

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "setup: needs Python 3.10 or newer, found " + sys.version.split()[0] + ": make setup PYTHON=python3.11")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: setup ## score, tune, merge, score again and draw on the small model: results/demo.png   [SEEDS="0 1 2"]
	$(RUN) -m recipes.demo --seeds $(SEEDS)

demo-all: setup ## the same for three tasks (lines, needles, RULER's variables) on the small model that knows them: results/demo_all.png
	$(RUN) -m recipes.demo --base recipes/tiny_tasks --tasks line niah vt --seeds 0 --samples 50 --out results/demo_all.json

test: setup ## lint, then run the tests (minutes; `pytest -m slow` has the rest)
	@$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadscope -m "not slow"

train: setup ## tune with a recipe   [RECIPE=recipes/tiny_line_sealc.yml]
	AXOLOTL_DO_NOT_TRACK=1 $(BIN)/accelerate launch -m axolotl.cli.train $(RECIPE)

data: setup ## write training samples   [TASK=line MODEL=recipes/tiny TOKENS=1900 SAMPLES=50]
	$(RUN) -m data_gen $(TASK) --tokenizer $(MODEL) --tokens $(TOKENS) --samples $(SAMPLES) --out data/$(TASK)_$(TOKENS).jsonl

eval: setup ## score a model, merged folder or adapter   [MODEL=recipes/tiny TASK=line LENGTHS=512,1900 SAMPLES=50 BACKEND=hf|vllm RESULTS=results]
	$(RUN) -m eval run --model $(MODEL) --task $(TASK) --lengths "$(LENGTHS)" --samples $(SAMPLES) --backend $(BACKEND) --out $(RESULTS)

report: setup ## gather results/*.json into results/report.html
	$(RUN) -m eval report

merge: setup ## fold an adapter into its model's weights   [ADAPTER=... OUT=ADAPTER_merged INTO=auto|o_proj|v_proj]
	$(RUN) -m axolotl_plugins.seal merge $(ADAPTER) $(OUT) --into $(INTO)

chaos: setup ## kill every command at random moments; the next run must end the same   [KILLS=50]
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) tests/chaos.py --full --kills $(KILLS)

lock: setup ## write down the versions that are installed: pip install -c requirements.lock -e '.[dev]'
	@{ echo "# The packages that the tests ran with, $$($(BIN)/python -V) on $$(uname -sm): make lock"; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > requirements.lock

lint: setup ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

recipes: setup ## write the paper's recipes again, from recipes/matrix.yml
	$(RUN) -m recipes write

recipes-smoke: setup ## launch every recipe for two steps on a random-weight miniature of its model (an hour)
	$(RUN) -m recipes smoke

study: setup ## the paper's tables on SmolLM2-135M, up to 2,048 tokens on this CPU (hours, resumes): results/smollm2.json
	$(RUN) -m recipes.study run --model $(STUDY_MODEL) --out outputs/study --longest 2048
	$(RUN) -m recipes.study collect --out outputs/study --result results/smollm2.json

probes: setup ## which heads matter and why, on the small model: results/probes, then `make report`
	$(RUN) -m recipes.probes

bench: setup ## time SEAL beside IA3 and LoRA on this CPU: results/bench.json
	$(RUN) -m recipes.bench

bench-data: setup ## time every task's data at 31K tokens with Mistral's tokenizer
	$(RUN) -m data_gen.bench

bench-gpu: setup ## the same at 7B on a GPU: results/bench_gpu.json   [BENCH_TOKENS="8192 31000 65536 131072"]
	$(RUN) -m recipes.bench --device cuda --shape llama2_7b --checkpointing --tokens $(BENCH_TOKENS) --repeats 3 --out results/bench_gpu.json

tiny-model: setup ## train the small base models in recipes/tiny and recipes/tiny_tasks again, from nothing
	$(RUN) -m recipes.tiny_model
	$(RUN) -m recipes.tiny_tasks
