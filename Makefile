# make demo   sets up, builds, trains on real digits, samples them, shows pictures
# make test   sets up, builds, lints, runs every test
# make bench  sets up, builds, times every implementation beside the others, judges the ratios
# make emulated   builds the CUDA kernels for the emulated GPU, and what tests it
# make sanitized  runs the kernels there, and fuzzes the CPU's, under AddressSanitizer and
#                 UndefinedBehaviorSanitizer
# make gpu-check  proves, tunes and measures the CUDA kernels on the GPU at hand, with PYTHON's torch
#                 (CALL=first, CALL=second; RESULTS=folder; GPU_CHECK=stage,stage)
# make gpu-wheels puts what a GPU's machine without network lacks into .wheels
# make cmake  builds with CMake into build/cmake (SANITIZE=address,undefined for the sanitizers)

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(VENV)/native-built
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

# Of the environment, not of the machine: what a clone needs is what pip has put there.
CMAKE := $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
    -DPython_EXECUTABLE=$(abspath $(BIN)/python)

.PHONY: demo test bench lint format build emulated sanitized gpu-check gpu-wheels cmake clean

demo: build
	$(BIN)/diffusion-ext demo

# A process of tests on each core, at most four: a thread of torch for each, which has little to do.
# One that dies, or hangs in a test for a quarter of an hour, ends the run, which names that test:
# a new one would begin it again.
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 DIFFUSION_EXT_REQUIRE_EMULATED=1 $(abspath $(BIN))/python -m pytest \
    -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
    --timeout 900 --timeout-method thread -p no:cacheprovider

test: build lint emulated
	$(PYTEST) --benchmark-disable tests benchmarks

# Half an hour on two cores. benchmarks/results/<device> has the results; a missed target is an error.
# On a GPU, for which there are no targets here (gpu-check has some): make bench BENCH_REPORT=
BENCH_REPORT ?= --fail-below benchmarks/targets
bench: build
	$(BIN)/python -m pytest -v benchmarks --benchmark-max-time=0.3 \
	    --benchmark-json=build/benchmarks.json --benchmark-group-by=group \
	    --benchmark-columns=min,median,rounds --benchmark-sort=min
	$(BIN)/python -m benchmarks.report build/benchmarks.json $(BENCH_REPORT)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

build: $(NATIVE)

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

emulated: $(VENV)/ready
	$(CMAKE) -B build/emulated
	$(BIN)/cmake --build build/emulated --target cuda_emulated planted_bugs

# Python itself is not sanitized, so the runtime is loaded first.
SANITIZED := LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 DIFFUSION_EXT_EMULATED=$(abspath build/sanitized)

sanitized: build
	$(CMAKE) -B build/sanitized -DDIFFUSION_EXT_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitized --target cuda_emulated planted_bugs _C
	$(SANITIZED) $(PYTEST) --dist load -q -m "not compiles" -k "cuda-emulated or emulation" tests/ops tests/emulation
	cd build/sanitized && $(SANITIZED) PYTHONPATH=$(abspath build/sanitized/python) \
	    DIFFUSION_EXT_FUZZED=$(abspath build/sanitized) $(PYTEST) --dist load -q $(abspath tests/fuzzing)

# No venv of ours: what drives a GPU comes with its machine.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(if $(CALL),--call $(CALL)) $(if $(RESULTS),--results $(RESULTS))

gpu-wheels: $(VENV)/ready
	$(BIN)/python benchmarks/gpu/wheels.py

cmake: $(VENV)/ready
	$(CMAKE) -B build/cmake -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DDIFFUSION_EXT_SANITIZE=$(SANITIZE)
	$(BIN)/cmake --build build/cmake
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

clean:
	rm -rf build dist *.egg-info diffusion_ext/*.so diffusion_ext/_build.json $(NATIVE)
