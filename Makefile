# Everything a newcomer runs. Needs python3 (3.11 or newer), gcc and make; all else goes into .venv.
# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?=
BENCH ?=
PYTEST ?=
# Compiling the CUDA engine takes minutes: not here where there is no NVIDIA driver, even if there is an nvcc.
export MOESHARD_CUDA ?= $(if $(wildcard /proc/driver/nvidia),auto,0)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
OLD := .venv/transformers-4.57

HEADERS := $(wildcard csrc/*.h csrc/*/*.h)
KERNELS := csrc/kernels/kernels.c# compiled once per instruction set
CORE := $(filter-out $(KERNELS),$(wildcard csrc/*.c csrc/base/*.c csrc/plan/*.c csrc/exchange/*.c csrc/kernels/*.c))
BINDING := $(wildcard csrc/python/*.c)
CUDA := $(wildcard cuda/*.c cuda/*.h cuda/*.cu cuda/*.cuh cuda/*/*.[ch])
EXAMPLES := $(wildcard docs/examples/*.c)

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

# ---- the environment ----------------------------------------------------------------------------
# Two stamps: the packages (pyproject.toml) and the extension (the C sources). A second call is instant.

.PHONY: build
build: .venv/.built $(OLD)/.installed ## make .venv: moeshard (editable) and all that tests and demo need

# torch goes first and pinned, so that nothing after it chooses another one.
.venv/.packages: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) install "$(TORCH)"
	$(PIP) install "$(TORCH)" --editable ".[hf,demo,notebooks,dev]"
	touch $@

.venv/.built: .venv/.packages setup.py $(HEADERS) $(CORE) $(KERNELS) $(BINDING) $(CUDA)
	$(PY) setup.py -q build_ext --inplace
	touch $@

# The older transformers line with the libraries it wants, beside the new one: PYTHONPATH=$(OLD) picks it.
$(OLD)/.installed: | .venv/.packages
	$(PIP) install --quiet --upgrade --target $(OLD) --no-deps "transformers==4.57.6" \
	  "huggingface_hub<1.0" "tokenizers<0.23" requests urllib3 charset-normalizer idna certifi
	touch $@

# The packages of an extra of pyproject.toml.
extra = $$($(PY) -c 'import tomllib; \
  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"])')

# DeepSpeed, a rival. Built against the torch that is there, without its compiled operations, none of which its MoE layer
# calls.
.venv/.compare: .venv/.packages
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(PIP) install --quiet --no-build-isolation "$(TORCH)" $(call extra,compare)
	touch $@

.venv/.docs .venv/.wheel: .venv/.%: .venv/.packages
	$(PIP) install --quiet $(call extra,$*)
	touch $@

# ---- what it is for -----------------------------------------------------------------------------

.PHONY: demo
demo: build ## a Switch encoder over 2 ranks on real English; DEMO="--experts 64 --json out.json"
	$(PY) -m moeshard demo $(DEMO)

.PHONY: notebooks
notebooks: build .venv/.compare ## run the notebooks; installs DeepSpeed, which one of them compares with
	$(PY) -m pytest --nbmake --nbmake-timeout=120 --durations=0 notebooks

.PHONY: docs pictures
docs: build .venv/.docs ## the documentation site: build/docs/index.html
	$(PY) -m sphinx -W --keep-going -q -b html docs build/docs
	@echo build/docs/index.html
pictures: build .venv/.compare ## draw docs/images again: figures, and what the notebooks show
	$(PY) docs/draw.py
	$(PY) docs/draw_notebooks.py

.PHONY: bench bench-quick
bench: build .venv/.compare ## moeshard and its rivals side by side, all cases: 40 minutes; results in benchmarks/results
	mkdir -p benchmarks/results
	$(PY) -m moeshard bench --output benchmarks/results $(BENCH)
bench-quick: build .venv/.compare ## the same with a case for every bar: 3 minutes; results in build/bench
	mkdir -p build/bench
	$(PY) -m moeshard bench --quick --output build/bench $(BENCH)

# ---- tests: quick ones first, pytest's own summary last ------------------------------------------

.PHONY: test
test: build ## lint, C tests, pytest with the older transformers, pytest
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory test-c
	$(MAKE) --no-print-directory test-old
	$(PY) -m pytest tests --ignore=tests/cuda $(PYTEST)

.PHONY: test-old
test-old: build ## the tests of whole models with transformers 4.57
	PYTHONPATH=$(OLD) $(PY) -m pytest -q tests/test_switch*.py tests/test_router.py tests/test_families.py tests/test_loading.py \
	  tests/test_saving.py tests/test_hub_code.py $(PYTEST)

.PHONY: test-compare
test-compare: build .venv/.compare ## against DeepSpeed's MoE layer and HuggingFace on 2 ranks; installs DeepSpeed
	MOESHARD_COMPARE=required $(PY) -m pytest tests/compare $(PYTEST)

# The C core without Python, under sanitizers. Every tests/c/test_*.c is a program; it fails by its exit code.
WARNINGS := -Wall -Wextra -Wshadow -Wconversion -Werror
C_TESTS := $(wildcard tests/c/test_*.c)
ISAS_x86_64 := generic avx2 avx512 avx512bf16
ISAS := $(or $(ISAS_$(shell uname -m)),generic)
FLAGS_avx2 := -mavx2 -mfma -mf16c
FLAGS_avx512 := $(FLAGS_avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl
FLAGS_avx512bf16 := $(FLAGS_avx512) -mavx512bf16
FLAGS_asan := -fsanitize=address,undefined -fno-sanitize-recover=all
FLAGS_tsan := -fsanitize=thread -Wno-unused-function# tests that fork are left out
# Without address randomisation: the thread sanitizer of gcc 12 cannot place its memory otherwise.
RUN_tsan := $(shell setarch -R true 2>/dev/null && echo setarch -R)

define SANITIZED
OBJECTS_$(1) := $(patsubst %.c,build/$(1)/%.o,$(CORE)) $(ISAS:%=build/$(1)/kernels-%.o)
build/$(1)/%.o: %.c $(HEADERS) tests/c/check.h
	@mkdir -p $$(@D)
	$(CC) -std=gnu11 -O1 -g $(WARNINGS) $$(FLAGS_$(1)) -Icsrc -c $$< -o $$@
build/$(1)/kernels-%.o: $(KERNELS) $(HEADERS)
	@mkdir -p $$(@D)
	$(CC) -std=gnu11 -O2 -g -fno-var-tracking-assignments $(WARNINGS) $$(FLAGS_$(1)) $$(FLAGS_$$*) -DMS_ISA=$$* -c $$< -o $$@
build/$(1)/test_%: build/$(1)/tests/c/test_%.o $$(OBJECTS_$(1))
	$(CC) $$(FLAGS_$(1)) $$^ -o $$@ -lpthread -lm -lrt
build/$(1)/example_%: build/$(1)/docs/examples/%.o $$(OBJECTS_$(1))
	$(CC) $$(FLAGS_$(1)) $$^ -o $$@ -lpthread -lm -lrt
endef
$(foreach sanitizer,asan tsan,$(eval $(call SANITIZED,$(sanitizer))))
.SECONDARY:

.PHONY: test-c test-c-asan test-c-tsan
test-c: test-c-asan test-c-tsan ## the C core alone, under address, undefined and thread sanitizers
test-c-asan test-c-tsan: test-c-%: $(C_TESTS:tests/c/%.c=build/\%/%) $(EXAMPLES:docs/examples/%.c=build/\%/example_%)
	@for program in $^; do echo "$$program"; $(RUN_$*) $$program; done

# ---- the C core for programs in C (docs/c_api.md) -------------------------------------------------

.PHONY: library
library: build/c/libmoeshard.a ## build/c/libmoeshard.a: the C core for programs in C; needs gcc only
CFLAGS_c := -std=gnu11 -O3 -fPIC -pthread $(if $(findstring avx2,$(ISAS)),,-DMS_ONLY_GENERIC)
build/c/%.o: %.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS_c) -ffp-contract=off -Icsrc -c $< -o $@
build/c/kernels-%.o: $(KERNELS) $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS_c) -ffp-contract=fast $(FLAGS_$*) $(if $(findstring avx512,$*),-mprefer-vector-width=512) \
	  -DMS_ISA=$* -c $< -o $@
build/c/libmoeshard.a: $(CORE:%.c=build/c/%.o) $(ISAS:%=build/c/kernels-%.o)
	rm -f $@
	$(AR) rcs $@ $^

# ---- CUDA: on a GPU if this machine has one, else on ptxsim (tests/ptxsim/README.md) --------------

# Everything in a folder of its own, with PTX, which ptxsim runs and later devices can compile.
GPU := build/gpu
GPU_ARCHS := 80+PTX;90a+PTX;100a
GPU_TESTS := $(patsubst tests/cuda/%.cu,$(GPU)/%,$(wildcard tests/cuda/test_*.cu))
REAL_GPU := $(shell nvidia-smi -L 2>/dev/null)
SIMULATOR := $(if $(REAL_GPU),,tests/ptxsim/build)
# A program named *_sm90 is for compute capability 9.0 and is told so; the others run as on an A100.
RUN_GPU := $(if $(REAL_GPU),,LD_LIBRARY_PATH=$(CURDIR)/$(SIMULATOR))

.PHONY: test-gpu test-gpu-engine test-gpu-plants
test-gpu: test-gpu-engine $(if $(REAL_GPU),,test-gpu-plants) ## the CUDA engine, on a GPU or without one; needs nvcc
test-gpu-engine: build $(GPU)/.built $(GPU_TESTS) $(SIMULATOR)
	@for program in $(GPU_TESTS); do echo "$$program"; \
	  case $$program in *_sm90) sm=90;; *) sm=80;; esac; env $(RUN_GPU) PTXSIM_SM=$$sm $$program; done
	$(if $(REAL_GPU),,env $(RUN_GPU) PTXSIM_SM=90 $(GPU)/test_engine)
	env $(RUN_GPU) PYTHONPATH=$(GPU)/lib .venv/bin/pytest -rs tests/cuda $(PYTEST)
test-gpu-plants: $(SIMULATOR) # bugs that the tests must find
	tests/cuda/plants.sh

.PHONY: coverage-gpu
coverage-gpu: ## which lines of the kernels test-gpu executes on ptxsim
	rm -f $(GPU)/coverage.jsonl
	PTXSIM_COVERAGE=$(CURDIR)/$(GPU)/coverage.jsonl $(MAKE) --no-print-directory test-gpu-engine
	$(PY) tests/ptxsim/coverage.py $(GPU)/coverage.jsonl cuda/ $(CURDIR)/cuda/

$(GPU)/.built: setup.py $(HEADERS) $(CORE) $(KERNELS) $(BINDING) $(CUDA) $(wildcard moeshard/*.py moeshard/*/*.py)
	MOESHARD_CUDA=1 MOESHARD_CUDA_ARCHS="$(GPU_ARCHS)" \
	  $(PY) setup.py -q build --build-lib $(GPU)/lib --build-temp $(GPU)/temp
	touch $@

# The C core and the engine as setup.py has compiled them, without Python's binding.
GPU_OBJECTS := $(patsubst %.c,$(GPU)/temp/%.o,$(filter-out csrc/reference.c,$(CORE)) $(wildcard cuda/*.c cuda/exchange/*.c)) \
  $(patsubst cuda/%.cu,$(GPU)/temp/cuda/$(subst ;,_,$(GPU_ARCHS))/%.o,$(wildcard cuda/*.cu)) \
  $(ISAS:%=$(GPU)/temp/%/$(KERNELS:.c=.o))
$(GPU)/test_counts: tests/cuda/counted_calls.c
$(GPU)/%: tests/cuda/%.cu $(GPU)/.built csrc/reference.c $(wildcard tests/cuda/*.cuh tests/cuda/*.h)
	nvcc -O3 -std=c++17 -cudart shared -lineinfo $(if $(findstring sm90,$*),,\
	  -gencode arch=compute_80,code=sm_80 -gencode arch=compute_80,code=compute_80) \
	  -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90a,code=compute_90a -DMS_CUDA_SM90 \
	  -o $@ $< $(filter %.c,$^) $(GPU_OBJECTS) -ldl -lrt -lpthread

.PHONY: tests/ptxsim/build
tests/ptxsim/build:
	$(MAKE) -s -C tests/ptxsim

.PHONY: lint
lint: build build/analyzer.h ## ruff, mypy, clang-format, gcc's warnings and analyzer; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict moeshard
	.venv/bin/clang-format --dry-run -Werror $(HEADERS) $(CORE) $(KERNELS) $(BINDING) $(wildcard cuda/*/*.[ch] tests/c/*.[ch]) $(EXAMPLES)
	gcc -std=gnu11 -fsyntax-only -O2 $(WARNINGS) $(CORE) -Icsrc $(C_TESTS) $(EXAMPLES)
	gcc -std=gnu11 -fsyntax-only -O2 $(WARNINGS) $(BINDING) -Icsrc $$($(PY) -c 'import numpy, sysconfig; \
	  print("-isystem", sysconfig.get_path("include"), "-isystem", numpy.get_include())')
	for isa in $(ISAS); do \
	  case $$isa in avx2) flags="$(FLAGS_avx2)";; avx512) flags="$(FLAGS_avx512)";; \
	    avx512bf16) flags="$(FLAGS_avx512bf16)";; *) flags=;; esac; \
	  gcc -std=gnu11 -fsyntax-only -O2 $(WARNINGS) $$flags -DMS_ISA=$$isa $(KERNELS); done
	for file in $(filter-out csrc/base/error.c,$(CORE)); do \
	  gcc -std=gnu11 -O1 -fanalyzer -Werror -D_GNU_SOURCE= -Icsrc -include build/analyzer.h -c $$file -o /dev/null; done

# The analyzer looks at one file at a time: here it learns that ms_fail returns the code it is given.
build/analyzer.h: Makefile
	@mkdir -p $(@D)
	printf '%s\n' '#include "moeshard.h"' \
	  '#define ms_fail(err, code, ...) (ms_fail(err, code, __VA_ARGS__), code)' > $@

.PHONY: format
format: build ## let ruff and clang-format rewrite the sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	.venv/bin/clang-format -i $(HEADERS) $(CORE) $(KERNELS) $(BINDING) $(wildcard cuda/*/*.[ch] tests/c/*.[ch]) $(EXAMPLES)

# ---- packages -----------------------------------------------------------------------------------

.PHONY: sdist wheel test-wheel
sdist: build ## dist/moeshard-*.tar.gz
	$(PY) -m build --no-isolation --sdist

# Other machines have no compiler, and an older C library: auditwheel names the oldest that will do in the wheel's name, and
# abi3audit checks that every later CPython will. The CUDA runtime comes with torch and must not be packed in.
wheel: build/wheel/.checked ## dist/moeshard-*-manylinux*.whl, for machines without a compiler (MOESHARD_CUDA=0: small)
build/wheel/.checked: .venv/.built .venv/.wheel pyproject.toml README.md $(wildcard moeshard/*.py* moeshard/*/*.py)
	rm -rf build/wheel dist/moeshard-*.whl
	$(PY) -m build --no-isolation --wheel --outdir build/wheel
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m auditwheel repair --exclude 'libcudart.so.*' --wheel-dir dist build/wheel/*.whl
	$(PY) -m abi3audit --strict --summary dist/moeshard-*.whl
	@for wheel in dist/moeshard-*.whl; do echo "$$wheel: $$(( $$(stat -c %s $$wheel) / 1000 )) kB"; done
	touch $@

test-wheel: wheel ## install the wheel in an empty environment, and run the demo there without a compiler
	rm -rf build/clean
	$(PYTHON) -m venv build/clean
	build/clean/bin/pip install --disable-pip-version-check --quiet "$(TORCH)"
	build/clean/bin/pip install --disable-pip-version-check --quiet "$(TORCH)" "$$(ls $(CURDIR)/dist/moeshard-*.whl)[hf,demo]"
	cd build/clean && env -i PATH="$(CURDIR)/build/clean/bin" OMP_WAIT_POLICY=passive bin/moeshard doctor
	cd build/clean && env -i PATH="$(CURDIR)/build/clean/bin" HOME="$(CURDIR)/build/clean" \
	  bin/moeshard demo --layers 4 --d-model 256 --d-ff 1024 --tokens 1024 --repeats 1
	rm -rf build/clean

.PHONY: clean
clean: ## remove all that make has made
	rm -rf .venv build dist moeshard.egg-info .mypy_cache .ruff_cache .pytest_cache moeshard/_core*.so \
	  moeshard/_cuda*.so tests/ptxsim/build tests/ptxsim/tests/bin moeshard-demo.png moeshard-encoder.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
