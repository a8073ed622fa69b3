# The daily habits. `make demo` and `make test` set up whatever they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
C_SOURCES := $(wildcard ninepd/*.c)
# Some of these are compiled, too: setup.py says which.
PY_SOURCES := $(wildcard ninepd/*.py ninepd/export/*.py ninepd/ops/*.py ninepd/p9/*.py)
C_FILES := $(C_SOURCES) $(wildcard guests/ninepd_guests/*.c bench/*.c bench/*.h)

.PHONY: all bench clean demo format guests lint test test-quick
.DELETE_ON_ERROR:

all: $(VENV)/built

# Ask for a boot of a guest: a tour, or with DIR=... a shell with that directory on /mnt.
demo: $(VENV)/built
	@$(BIN)/ninepd demo $${DIR:+"$$DIR"}

# Everything, booted guests included. PYTEST_ARGS narrows it down.
test: lint guests
	$(BIN)/pytest $(PYTEST_ARGS)

# All but the booted guests.
test-quick: $(VENV)/built
	$(BIN)/pytest --ignore=tests/guest $(PYTEST_ARGS)

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

# Figures beside those of QEMU's server, virtiofsd and bare system calls; a report in build/bench.
# BENCH_ARGS='--plan full' takes its time.
bench: $(VENV)/built guests
	@$(BIN)/python -m bench.run $(BENCH_ARGS)

# QEMU, kernels and User-Mode Linux, in a cache outside the tree.
guests: $(VENV)/built
	@$(BIN)/python -m ninepd_guests.tools all

clean:
	rm -rf $(VENV) build dist *.egg-info ninepd/_libvring.* *.so
	find ninepd -name '*.so' -delete

$(VENV)/installed: pyproject.toml guests/pyproject.toml setup.py contrib/setup-debian.sh
	@PYTHON=$(PYTHON) contrib/setup-debian.sh
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip --disable-pip-version-check install -qq --upgrade 'pip>=25.1'
	@$(BIN)/pip --disable-pip-version-check install -qq --group dev
	@$(BIN)/pip --disable-pip-version-check install -qq --editable . --editable guests
	@touch $@

$(VENV)/built: $(VENV)/installed $(C_SOURCES) $(PY_SOURCES) ninepd/_vring_build.py
	@NINEPD_WERROR=1 $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
