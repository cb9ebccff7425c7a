# What README.md has under "Try it without a GPU", and what a developer runs.
#
#   make demo      environment, extension, a bundle of nine ops of one model, then the dispatch microbenchmark: minutes
#   make bundle    environment, extension, the bundle of every row: all ops, sizes and dtypes
#   make wheel     dist/*.whl with the bundles for H200 and H100 inside; if CuteDSL is installed, for CPUs such as this one alone
#   make test      environment, extension, C++ tests, Python tests (on a GPU too where there is one), a minute of random calls
#   make test-all  make test, and the code of every row of every op compiled, of which make test compiles each kind once
#   make test-vllm the plug-in on vLLM's real engine over simulated kernels, no GPU: downloads vLLM's Python, 500 MB
#   make test-sglang the plug-in on SGLang's Python over the null driver, no GPU: downloads SGLang's wheel, 40 MB
#   make test-wheels  one wheel for two torches, in an environment of each: downloads both with their dependencies, gigabytes
#   make lint      ruff, mypy --strict, clang-format
#   make sanitize  the C++ tests under ASan + UBSan, then those with threads under TSan
#
# VENV is the environment to use: an active one, or .venv, which is made. What it has already is not installed again, so
# an environment with a CUDA build of torch is used as it is. TORCH is what a new environment gets.
PYTHON ?= python3
VENV ?= $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
TORCH ?= torch==2.13.0
BUNDLE ?= bundle
DEMO_BUNDLE ?= build/demo-bundle
WHEEL_TORCH ?= torch==2.13.0 torch==2.14.1
PY := $(VENV)/bin/python
CTEST_BUILD := build/ctest

.PHONY: demo bundle wheel test test-all test-vllm test-sglang test-wheels setup setup-test lint sanitize core-test clean

$(PY):
	$(PYTHON) -m venv $(VENV)

setup: $(PY)
	$(PY) scripts/setup.py --torch "$(TORCH)" --extras build

setup-test: $(PY)
	$(PY) scripts/setup.py --torch "$(TORCH)" --extras build,cutedsl,plot,test

demo: setup
	$(PY) scripts/demo.py $(DEMO_BUNDLE)

bundle: setup
	$(PY) -m hdispatch build --target auto --out $(BUNDLE)
	$(PY) -m hdispatch doctor $(BUNDLE)

wheel: setup
	$(PY) scripts/embedded_bundles.py h200 h100 --out build/embedded
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist \
	  -C cmake.define.HDISPATCH_EMBED_BUNDLE=$(CURDIR)/build/embedded/sm_90a-h200-h100.tar.xz .

test: setup-test core-test
	$(PY) -m pytest tests -n 2 --dist worksteal
	$(PY) scripts/fuzz.py 30 & $(PY) scripts/fuzz.py 30 --seed 1; status=$$?; wait $$! && exit $$status

test-all: test
	HDISPATCH_TEST_WHOLE=1 $(PY) -m pytest tests/cpu/test_records.py

test-vllm: setup-test
	$(PY) scripts/fetch_vllm.py build/vllm
	$(PY) -m pytest tests/vllm

test-sglang: setup-test
	$(PY) scripts/fetch_sglang.py build/sglang
	$(PY) -m pytest tests/sglang

core-test: $(PY)
	$(PY) scripts/setup.py --torch "$(TORCH)" --extras build --only-tools
	$(PY) scripts/core_tests.py $(CTEST_BUILD)

sanitize: setup
	$(PY) scripts/core_tests.py $(CTEST_BUILD)-asan --sanitize address,undefined
	$(PY) scripts/core_tests.py $(CTEST_BUILD)-tsan --sanitize thread

test-wheels: setup-test
	$(PY) scripts/setup.py --torch "$(TORCH)" --extras wheels --only-tools
	rm -rf build/dist
	$(PY) scripts/wheels.py --torch $(patsubst torch==%,%,$(WHEEL_TORCH)) --out build/dist
	HDISPATCH_WHEEL=$$(echo build/dist/*.whl) HDISPATCH_WHEEL_TORCH="$(WHEEL_TORCH)" $(PY) -m pytest tests/wheels -rA

lint: setup-test
	$(PY) scripts/setup.py --torch "$(TORCH)" --extras build,cutedsl,plot,test,lint --only-tools
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'tests/core/*.h' 'tests/core/*.cpp')

clean:
	rm -rf build .venv bundle
