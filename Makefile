# `make help` lists the targets. They set up what they need in .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(VENV)/native-built
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

# Of the environment, not of the machine: what a clone needs is what pip has put there.
CMAKE := $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
    -DPython_EXECUTABLE=$(abspath $(BIN)/python)

.DEFAULT_GOAL := help
.PHONY: help demo test light bench docs notebooks wheels lint format build emulated gpu-tests \
    sanitized processors gpu-check gpu-wheels cmake clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build ## train on real digits, sample them, show pictures: three minutes
	$(BIN)/diffusion-ext demo

# A process of tests on each core, at most four: a thread of torch for each, which has little to do.
# One that dies, or hangs in a test for a quarter of an hour, ends the run, which names that test:
# a new one would begin it again.
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 DIFFUSION_EXT_REQUIRE_EMULATED=1 $(abspath $(BIN))/python -m pytest \
    -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
    --timeout 900 --timeout-method thread -p no:cacheprovider

test: build lint docs emulated gpu-tests ## build, lint, build the documentation, run every test
	$(PYTEST) --benchmark-disable tests benchmarks

# What .[dev] brings beside .[test] does not come for every Python. The package is the installed one:
# hence another folder to work in.
LIGHT := build/light
LIGHT_TESTS := ops nn samplers/test_samplers.py samplers/test_every_sampler.py \
    sampling/test_sampling.py training/test_training.py training/test_start_methods.py app/test_spelling.py
light: ## what each Python has to pass (PYTHON=python3.13): an install, its smoke test, the tests of the ops
	$(PYTHON) -m venv $(LIGHT)
	$(LIGHT)/bin/pip install --quiet $(TORCH)
	$(LIGHT)/bin/pip install --quiet "setuptools>=77" wheel ninja "pybind11>=2.13" numpy
	DIFFUSION_EXT_NATIVE=1 $(LIGHT)/bin/pip install --no-build-isolation ".[test]"
	cp release/smoke.py $(LIGHT)
	cd $(LIGHT) && bin/python smoke.py
	cd $(LIGHT) && OMP_NUM_THREADS=1 bin/python -m pytest -q -p no:cacheprovider -m "not compiles" \
	    $(LIGHT_TESTS:%=$(abspath tests)/%)

# The package with the emulated kernels, not the tree's: hence no working folder on Python's path.
STAND_IN = PYTHONSAFEPATH=1 PYTHONPATH=$(abspath $(1))/python:$(abspath tests/stand_in/site) \
    DIFFUSION_EXT_EMULATED=$(abspath $(1)) DIFFUSION_EXT_TEST_BACKENDS=cuda
GPU_TESTS := -q -m "not compiles" tests/ops $(wildcard tests/*/test_*_cuda.py) tests/stand_in

gpu-tests: emulated ## every test that a GPU would run, on the stand-in for one
	$(call STAND_IN,build/emulated) $(PYTEST) $(GPU_TESTS)

# Half an hour on two cores. benchmarks/results/<device> has the results; a missed target is an error.
# On a GPU, for which there are no targets here (gpu-check has some): make bench BENCH_REPORT=
BENCH_REPORT ?= --fail-below benchmarks/targets
bench: build ## every implementation beside the others, and the targets: half an hour
	$(BIN)/python -m pytest -v benchmarks --benchmark-max-time=0.3 \
	    --benchmark-json=build/benchmarks.json --benchmark-group-by=group \
	    --benchmark-columns=min,median,rounds --benchmark-sort=min
	$(BIN)/python -m benchmarks.report build/benchmarks.json $(BENCH_REPORT)

# Warnings are errors: of the builder, of links, of docstrings.
docs: build ## the documentation, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

notebooks: build ## run the tutorials and keep their results in them
	$(BIN)/python release/notebooks.py

# The CUDA library takes six minutes on two cores more: it is for every GPU that the toolkit knows.
wheels: $(VENV)/ready ## the sdist and a manylinux wheel, tried in an empty environment (CUDA=1: with the CUDA library)
	$(BIN)/python release/wheels.py $(if $(CUDA),--cuda) --torch $(TORCH)
	$(BIN)/twine check --strict dist/*/*

lint: $(VENV)/ready ## ruff, clang-format, the types of the public names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python release/public_types.py
	files=$$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh') && test -n "$$files" && \
	    $(BIN)/clang-format --dry-run --Werror $$files

format: $(VENV)/ready ## ruff and clang-format, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

build: $(NATIVE) ## the C++ library, and the CUDA library where torch has CUDA

# torch first and by itself: whatever depends on it then takes the one that is there.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install "setuptools>=77" wheel ninja "pybind11>=2.13" numpy
	DIFFUSION_EXT_NATIVE=0 $(BIN)/pip install --no-build-isolation -e ".[dev]"
	$(BIN)/pip install --no-deps k-diffusion  # the tests take its samplers alone; the rest wants torchvision
	touch $@

$(NATIVE): $(VENV)/ready $(SOURCES)
	@echo "building the C++ library (a minute); the CUDA one too if torch has CUDA and nvcc is here"
	DIFFUSION_EXT_NATIVE=1 $(BIN)/pip install --no-build-isolation --no-deps -e .
	touch $@

emulated: build ## the CUDA kernels for the emulated GPU, and what tests it
	$(CMAKE) -B build/emulated
	$(BIN)/cmake --build build/emulated --target _cuda stand_in planted_bugs
	ln -sf $(abspath diffusion_ext)/_C*.so build/emulated/python/diffusion_ext

# Python itself is not sanitized, so the runtime is loaded first.
SANITIZED := LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 DIFFUSION_EXT_EMULATED=$(abspath build/sanitized)

sanitized: build ## the kernels and a fuzz of them under AddressSanitizer and UndefinedBehaviorSanitizer
	$(CMAKE) -B build/sanitized -DDIFFUSION_EXT_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitized --target _cuda stand_in planted_bugs _C
	$(SANITIZED) $(call STAND_IN,build/sanitized) $(PYTEST) --dist load -q -m "not compiles" \
	    --ignore tests/ops/test_device.py tests/ops tests/stand_in
	$(SANITIZED) $(PYTEST) --dist load -q tests/emulation
	cd build/sanitized && $(SANITIZED) PYTHONPATH=$(abspath build/sanitized/python) \
	    DIFFUSION_EXT_FUZZED=$(abspath build/sanitized) $(PYTEST) --dist load -q $(abspath tests/fuzzing)

# On Debian; installs a compiler and an emulator where they are missing.
processors: build ## the kernels on ARM and on old x86, emulated, beside this processor's: six minutes
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/processors/check.py

# No venv of ours: what drives a GPU comes with its machine.
gpu-check: ## prove, tune and measure the CUDA kernels on a GPU (CALL=first, CALL=second; docs/gpu.md)
	$(PYTHON) benchmarks/gpu_check.py $(if $(CALL),--call $(CALL)) $(if $(RESULTS),--results $(RESULTS))

gpu-wheels: $(VENV)/ready ## what a GPU's machine without network lacks, in .wheels
	$(BIN)/python benchmarks/gpu/wheels.py

cmake: $(VENV)/ready ## the same sources by CMake: compile_commands.json, ctest (SANITIZE=address,undefined)
	$(CMAKE) -B build/cmake -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DDIFFUSION_EXT_SANITIZE=$(SANITIZE)
	$(BIN)/cmake --build build/cmake
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

clean: ## remove what was built
	rm -rf build dist *.egg-info diffusion_ext/*.so diffusion_ext/_build.json $(NATIVE)
