# make demo   sets up, builds, trains on real digits, samples them, shows pictures
# make test   sets up, builds, lints, runs every test
# make bench  sets up, builds, compares the kernels with eager torch
# make emulated  builds the CUDA kernels for the emulated GPU, and what tests it
# make cmake  builds with CMake into build/cmake (SANITIZE=address,undefined for the sanitizers)

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(VENV)/native-built
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test bench lint format build emulated cmake clean

demo: build
	$(BIN)/diffusion-ext demo

test: build emulated lint
	DIFFUSION_EXT_REQUIRE_EMULATED=1 $(BIN)/python -m pytest --benchmark-disable tests benchmarks

bench: build
	$(BIN)/python -m pytest benchmarks --benchmark-group-by=group --benchmark-columns=min,median,rounds

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
	touch $@

$(NATIVE): $(VENV)/ready $(SOURCES)
	@echo "building the C++ library (a minute); the CUDA one too if torch has CUDA and nvcc is here"
	DIFFUSION_EXT_NATIVE=1 $(BIN)/pip install --no-build-isolation --no-deps -e .
	touch $@

build/emulated/build.ninja: $(VENV)/ready
	cmake -S . -B build/emulated -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python)

emulated: build/emulated/build.ninja
	cmake --build build/emulated --target cuda_emulated planted_bugs

cmake: $(VENV)/ready
	cmake -S . -B build/cmake -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	    -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DDIFFUSION_EXT_SANITIZE=$(SANITIZE)
	cmake --build build/cmake
	ctest --test-dir build/cmake --output-on-failure

clean:
	rm -rf build dist *.egg-info diffusion_ext/*.so diffusion_ext/_build.json $(NATIVE)
