# Every target makes the virtual environments it needs; a machine needs only make and Python 3.11 or newer.

PYTHON ?= python3
JOBS ?= 2

# pyenv leaves a python3.12 on PATH that may not run, so each candidate is tried.
PYTHON312 := $(shell for p in python3.12 "$(PYTHON)" "$$(pyenv root 2>/dev/null)"/versions/3.12.*/bin/python; do \
	"$$p" -c 'import sys; assert sys.version_info[:2] == (3, 12); print(sys.executable)' 2>/dev/null && break; done)
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

TORCH := torch==2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
JAX_RACES := 0.12.0.1
COMPILE_PYTHON := $(or $(PYTHON312),$(PYTHON))
# The JAX that the kernels have run with on a GPU, as far as the Python of an environment ($(1)) has it.
JAX_GPU = $$($(1)/bin/python -c 'import sys; print("0.11.2" if sys.version_info >= (3, 12) else "0.10.2")')
CUDA_WHEELS := nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
	nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvdisasm==13.2.51

# Where there is a GPU these tests still run on the CPU, in JAX and in torch.
ON_CPU := JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=
PYTEST := -m pytest -q -n $(JOBS)
FAST := -m "not compile and not slow"

.PHONY: help demo test test-suite test-kernels test-races test-compile lint bench readme clean

help:
	@echo "make demo          trains a small transformer on text, then calls the same attention from PyTorch"
	@echo "make test          the test suite, on the CPU; kernels run in an interpreter"
	@echo "make test-compile  compiles the kernels for an H100 and reads what ptxas says; needs no GPU"
	@echo "make lint          ruff and pyright"
	@echo "make bench         jflash beside every peer that is installed"
	@echo "make readme        rewrites the generated parts of README.md"
	@echo "make clean         removes what the targets above made"

demo: .venv/ready
	.venv/bin/python -m examples.train_text
	@echo "== attention alone: time and memory against sequence length"
	.venv/bin/python -m examples.attention_plot

test: test-suite test-kernels test-races

test-suite: .venv/ready
	@echo "== the suite, on the CPU"
	$(ON_CPU) .venv/bin/python $(PYTEST) $(FAST) tests --ignore=tests/kernels

test-kernels: .venv/ready
	@echo "== the kernels, interpreted"
	$(ON_CPU) .venv/bin/python $(PYTEST) $(FAST) tests/kernels

ifdef PYTHON312
test-races: .venv312/ready
	@echo "== the kernels, interpreted by JAX $(JAX_RACES) under Python 3.12"
	$(ON_CPU) .venv312/bin/python $(PYTEST) $(FAST) tests/kernels
else
test-races:
	@echo "== skipped: the kernels under JAX $(JAX_RACES), which finds most races. It needs Python 3.12, and none"
	@echo "   was found (python3.12, $(PYTHON), pyenv's); the run above checked their numbers and barriers."
endif

test-compile: .venv-compile/ready
	@echo "== the kernels, compiled for an H100"
	$(ON_CPU) .venv-compile/bin/python $(PYTEST) -m "compile and not slow" tests/kernels

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

bench: .venv/ready
	.venv/bin/python -m bench attention

readme: .venv/ready
	$(ON_CPU) .venv/bin/python -m bench.readme

clean:
	rm -rf .venv .venv312 .venv-compile out dist build .pytest_cache .ruff_cache .hypothesis

# The environments. A file `ready` says that one is complete; a changed pyproject.toml or Makefile renews it.
.venv/ready: pyproject.toml Makefile
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jflash needs Python 3.11 or newer: make PYTHON=/path/to/python"; exit 1; }
	@echo "== .venv: installing JAX, Flax and PyTorch ($(if $(GPU),CUDA,CPU)); a few minutes the first time"
	@"$(PYTHON)" -m venv .venv
ifdef GPU
	@.venv/bin/pip install -qq $(TORCH)
	@.venv/bin/pip install -qq -e '.[cuda13,torch,flax,bench,dev]' jax==$(call JAX_GPU,.venv)
else
	@.venv/bin/pip install -qq --no-deps --retries 1 --index-url $(TORCH_CPU_INDEX) $(TORCH) 2>/dev/null || \
		.venv/bin/pip install -qq $(TORCH)
	@.venv/bin/pip install -qq -e '.[torch,flax,bench,dev]'
endif
	@touch $@

.venv312/ready: pyproject.toml Makefile
	@echo "== .venv312: installing JAX $(JAX_RACES)"
	@"$(PYTHON312)" -m venv .venv312
	@.venv312/bin/pip install -qq -e . jax==$(JAX_RACES) hypothesis pytest pytest-timeout pytest-xdist
	@touch $@

.venv-compile/ready: pyproject.toml Makefile
	@echo "== .venv-compile: installing JAX's CUDA plugin and ptxas, 1.3 GB"
	@"$(COMPILE_PYTHON)" -m venv .venv-compile
	@jax=$(call JAX_GPU,.venv-compile); \
		.venv-compile/bin/pip install -qq -e . jax==$$jax hypothesis pytest pytest-timeout pytest-xdist && \
		.venv-compile/bin/pip install -qq --no-deps jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax $(CUDA_WHEELS)
	@touch $@
