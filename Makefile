# `make` lists the usual targets (`##`), `make help-all` the rest too (`#+`). Every target sets up what it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
ifneq ($(words $(VENV)),1)
$(error VENV: found a blank in '$(VENV)', which make cannot handle: name another folder)
endif
BIN := $(VENV)/bin
RUN := AXOLOTL_DO_NOT_TRACK=1 $(BIN)/python
SEAL := AXOLOTL_DO_NOT_TRACK=1 $(BIN)/seal
EXTRAS := axolotl,eval,gguf,dev

RECIPE ?= recipes/smollm2_line_sealc.yml
MODEL ?= models/smollm2-135m
TASK ?= line
BACKEND ?= hf
RESULTS ?= results
LENGTHS ?=
SAMPLES ?=
METRIC ?=
ADAPTER ?= outputs/smollm2_line_sealc
OUT ?= $(patsubst %/,%,$(ADAPTER))_merged
INTO ?= auto
TOKENS ?= 2048
KILLS ?= 50
PYTHON_VERSION ?= 3.12
PART ?= 500
BENCH_TOKENS ?= 8192,31000,65536,131072

.DEFAULT_GOAL := help
.PHONY: help help-all setup demo model test train data eval report merge study recipes recipes-smoke lint docs bench bench-data \
  bench-gpu chaos wheelhouse lock

help: ## list the usual targets and their variables; `make help-all` lists all
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

help-all: #+ list all targets
	@awk -F ':.*#[#+] ' '/^[a-z-]+:.*#[#+] / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## create a virtual environment in .venv and install the project with its extras

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "setup: needs Python 3.10 or newer, found " + sys.version.split()[0] + ": make setup PYTHON=python3.11")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

DEMO := outputs/smollm2_demo
DEMO_MODELS := models/smollm2-135m $(DEMO)_sealh_merged $(DEMO)_sealc_merged
DEMO_TEST := --task line --lengths 256,512,1024 --samples 20 --out outputs/demo
# What an interrupted run has finished is not done again; whoever edits a recipe trains, merges and scores again.
demo: setup ## tune, merge, score and draw SEAL-H and SEAL-C on SmolLM2-135M: results/demo.png (ten minutes)
	@$(MAKE) --no-print-directory outputs/demo/line_outputs_smollm2_demo_sealc.json
	$(RUN) -m recipes.demo

model: setup #+ fetch SmolLM2-135M-Instruct, a chat model for CPUs, into models/smollm2-135m (90 MB)
	$(SEAL) recipe fetch

models/smollm2-135m/config.json:
	$(SEAL) recipe fetch

$(DEMO)_%/adapter_model.safetensors: recipes/smollm2_demo_%.yml | models/smollm2-135m/config.json
	HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) \
	  $(BIN)/accelerate launch -m axolotl.cli.train $< # which takes one thread if it is not told

.SECONDARY: # make deletes adapters otherwise, as intermediate files

$(DEMO)_%_merged/seal_merge.json: $(DEMO)_%/adapter_model.safetensors
	rm -rf $(@D)
	$(SEAL) merge $(<D) $(@D)

# All samples of the base and the merged models, then some of the adapters: merged and unmerged must agree.
outputs/demo/line_outputs_smollm2_demo_sealc_merged.json: $(DEMO)_sealh_merged/seal_merge.json $(DEMO)_sealc_merged/seal_merge.json
	$(SEAL) eval $(addprefix --model ,$(DEMO_MODELS)) $(DEMO_TEST)

outputs/demo/line_outputs_smollm2_demo_sealc.json: outputs/demo/line_outputs_smollm2_demo_sealc_merged.json
	$(SEAL) eval --model $(DEMO)_sealh --model $(DEMO)_sealc $(DEMO_TEST) --limit 4

test: setup ## lint, then run the tests (minutes; `pytest -m slow` has the rest)
	@$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadscope -m "not slow"

train: setup $(if $(findstring recipes/smollm2,$(RECIPE)),model) ## tune with a recipe   [RECIPE=recipes/smollm2_line_sealc.yml]
	AXOLOTL_DO_NOT_TRACK=1 $(if $(findstring recipes/smollm2,$(RECIPE)),OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)}) \
	  $(BIN)/accelerate launch -m axolotl.cli.train $(RECIPE)

data: setup $(if $(findstring models/smollm2,$(MODEL)),model) ## write training samples   [TASK=line MODEL=models/smollm2-135m TOKENS=2048 SAMPLES=50]
	$(SEAL) data $(TASK) --tokenizer $(MODEL) --tokens $(TOKENS) $(if $(SAMPLES),--samples $(SAMPLES)) --out data/$(TASK)_$(TOKENS).jsonl

eval: setup $(if $(findstring models/smollm2,$(MODEL)),model) ## score a model, merged folder or adapter   [MODEL=models/smollm2-135m TASK=line|FILE.jsonl METRIC=contains|... LENGTHS=512,1024,2048 SAMPLES=50 BACKEND=hf|vllm RESULTS=results]
	$(SEAL) eval --model $(MODEL) --task $(TASK) --lengths "$(LENGTHS)" $(if $(SAMPLES),--samples $(SAMPLES)) $(if $(METRIC),--metric $(METRIC)) --backend $(BACKEND) --out $(RESULTS)

report: setup ## gather results/*.json into results/report.html
	$(SEAL) report

merge: setup ## fold an adapter into its model's weights   [ADAPTER=... OUT=ADAPTER_merged INTO=auto|o_proj|v_proj]
	$(SEAL) merge $(ADAPTER) $(OUT) --into $(INTO)

study: setup ## the paper's tables on SmolLM2-135M, up to 2,048 tokens on this CPU (a day; resumes): outputs/study_cpu
	@$(MAKE) --no-print-directory models/smollm2-135m/config.json
	$(SEAL) study run --model models/smollm2-135m --out outputs/study_cpu --longest 2048
	$(SEAL) study collect --out outputs/study_cpu --result outputs/study_cpu/smollm2.json

recipes: setup ## render the paper's recipes from recipes/matrix.yml
	$(SEAL) recipe write

lint: setup ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Packages with an __all__ show only what is in it, so their modules are named one by one.
docs: setup #+ write the API reference, from docstrings, into docs/api
	AXOLOTL_DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 $(BIN)/pdoc --docformat google --output-directory docs/api \
	  axolotl_plugins data_gen eval recipes $(subst /,.,$(basename $(wildcard axolotl_plugins/se*/[a-z]*.py data_gen/tasks/[a-z]*.py)))

recipes-smoke: setup #+ launch recipes for two steps on random-weight miniatures (an hour)   [NAMES="mistral7b_vt_sealh ..."]
	$(RUN) tests/smoke.py $(NAMES)

bench: setup #+ time SEAL beside IA3 and LoRA on this CPU: results/bench.json
	$(RUN) -m recipes.bench

bench-data: setup #+ time every task's data at 31K tokens with Mistral's tokenizer
	$(RUN) tests/bench_data.py

bench-gpu: setup #+ the same at 7B on a GPU: results/bench_gpu.json   [BENCH_TOKENS=8192,31000,65536,131072]
	$(RUN) -m recipes.bench --device cuda --shape llama2_7b --settings full --tokens $(BENCH_TOKENS) --repeats 3 --out results/bench_gpu.json

chaos: setup #+ kill every command at random; the next run must write the same bytes   [KILLS=50]
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) tests/chaos.py --full --kills $(KILLS)

wheelhouse: setup #+ download what a GPU machine without a network needs, without PyTorch   [PYTHON_VERSION=3.12 OUT=wheels PART=500]
	$(RUN) -m recipes.tools.wheelhouse --python $(PYTHON_VERSION) --out $(if $(filter file,$(origin OUT)),wheels,$(OUT)) --part $(PART)

lock: setup #+ write the installed versions to requirements.lock, for pip's -c
	@{ echo "# The packages that the tests ran with, $$($(BIN)/python -V) on $$(uname -sm): make lock"; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > requirements.lock
