# Everything here works on a fresh machine that has only Python >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow check soak bench proofs docs clean

demo: $(READY)            ## train the demo recipe on handwritten digits: about a minute
	$(BIN)/pitstop train demo

test: check               ## linters, types, and every test that is not slow, on all cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-slow: $(READY)       ## the tests that take minutes
	$(BIN)/python -m pytest -m slow --timeout 3600

check: $(READY)           ## formatting, lints, types, direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

soak: $(READY)            ## 200 SIGKILLs and 50 damaged checkpoints: minutes
	$(BIN)/python tests/cli/soak.py --kills 200 --damages 50 --seed 0

bench: $(READY)           ## the benchmarks; nothing else should be running
	$(BIN)/python benchmarks/engine_overhead.py
	$(BIN)/python benchmarks/save_stall.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/agreement_cost.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/loader_in_training.py
	$(BIN)/python benchmarks/loader_memory.py index
	$(BIN)/python benchmarks/loader_memory.py flat
	$(BIN)/python benchmarks/loader_memory.py cold
	$(BIN)/python benchmarks/pack.py
	$(BIN)/python benchmarks/stage.py
	$(BIN)/python benchmarks/augment.py

proofs: $(READY)          ## what docs/results.md shows: hours; give TIMM_TRAIN=path/to/timm/train.py
	$(BIN)/python benchmarks/cifar.py
	$(BIN)/python benchmarks/against_timm.py --timm-train "$(TIMM_TRAIN)"
	$(BIN)/pitstop ablate benchmarks/recipes/ablation.yaml --data ../shared/data/cifar10.tar.gz \
	    --seeds 3 --drop progressive_resizing --drop ema --drop blurpool --drop label_smoothing \
	    --drop mixup --drop alternating_flip --drop no_decay_on_norms --drop freezing
	$(BIN)/python benchmarks/finetuning.py
	$(BIN)/python benchmarks/plan_error.py
	$(BIN)/python benchmarks/plan_here.py

docs: $(READY)            ## the site of the documents, into build/site; warnings are errors
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean:                    ## remove what make made (runs/ stays)
	rm -rf .venv build dist src/*.egg-info

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pitstop needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)
