# Two commands set everything up on a machine with Python 3.11 and pip: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ENVIRONMENTS := npu mindspore triton-ascend

.PHONY: install lock demo test ci check verify-emulated clean

install: $(VENV)/.installed

# torch is pinned by version: which build of it comes is for the machine to say. Python compiles
# what it imports, a fifth of all that is installed.
$(VENV)/.installed: pyproject.toml locks/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile --require-hashes --no-deps -r locks/cpu.txt
	$(BIN)/pip install -q torch==2.13.0 --no-compile
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

# Asks the registry for the newest versions that pyproject allows.
lock: install
	$(BIN)/python locks/lock.py

demo: install
	$(BIN)/python -m v4_ascend.cli.demo

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread a process: two test processes share two cores. And a process keeps the memory it has
# freed: tensors of real widths spend half their time in page faults otherwise.
TEST := OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 \
  MALLOC_TOP_PAD_=67108864

test: check
	$(TEST) $(BIN)/python -m pytest -q -n 2 --dist worksteal

# What CI runs: real widths and long drills too, and each vendor's stack without its hardware.
ci: check
	$(TEST) $(BIN)/python -m pytest -q -n 2 --dist worksteal --slow
	$(MAKE) verify-emulated

# What can be shown of each vendor's stack without its hardware, each in an environment of its own.
verify-emulated: $(ENVIRONMENTS:%=verify-%)

DIST := load
# Here a file's tests share what its chips did, which takes minutes: a file is one process's.
verify-npu: DIST := loadscope --no-loadscope-reorder

verify-%: install
	$(TEST) TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
	  $$($(BIN)/python -m v4_ascend.emulation.environment $*) \
	  -m pytest -q -n 2 --dist $(DIST) -W default --environment $*

clean:
	rm -rf $(VENV) .demo
