# The two commands of the README are `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
PORT ?= 50051
SOURCES := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h) CMakeLists.txt setup.py pyproject.toml constraints.txt
# One thread each for what brings its own pools. PYTHONSAFEPATH: ./kernels must not pass for a package of that name.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 TOKENIZERS_PARALLELISM=false

.PHONY: base setup demo check test sanitize fuzz soak serve gpu-check gpu-tune proto clean

base: $(VENV)/base.stamp
setup: $(VENV)/setup.stamp

$(VENV)/base.stamp: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e .
	touch $@

$(VENV)/setup.stamp: $(VENV)/base.stamp
	$(PIP) install torch==2.13.0
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@

demo: base
	$(BIN)/python examples/northstar/demo.py

serve: base
	@test -n "$(MODEL)" || { echo "usage: make serve MODEL=folder [PORT=n]" >&2; exit 2; }
	$(BIN)/vivace serve $(MODEL) --port $(PORT)

check: setup
	$(TEST_ENV) $(BIN)/python tests/stages.py lint types fast

test: setup
	$(TEST_ENV) $(BIN)/python tests/stages.py lint types all sanitize package

sanitize: setup
	$(BIN)/python tests/stages.py sanitize

fuzz: setup
	$(TEST_ENV) $(BIN)/python tests/serving/fuzz.py

soak: setup
	$(TEST_ENV) $(BIN)/python tests/serving/soak.py

gpu-check:
	@test -n "$(RESULTS)" || { echo "usage: make gpu-check RESULTS=folder" >&2; exit 2; }
	cmake -S . -B build/gpu -DCMAKE_BUILD_TYPE=Release -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/kernels
	cmake --build build/gpu --parallel $$(nproc)
	PYTHONPATH=src$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON) tests/gpu/check.py --results $(RESULTS) $(GPU_CHECK)

gpu-tune:
	PYTHONPATH=src $(PYTHON) tests/gpu/tune.py $(TUNE)

proto: setup
	$(BIN)/python serving/protos/generate.py

clean:
	rm -rf build dist $(VENV) src/*.egg-info kernels/*.so
