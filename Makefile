# The daily habits. `make demo` and `make test` set up whatever they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GUEST_FOLDERS := $(or $(TMPDIR),/tmp)/np-$(shell id -u)
PIP := $(BIN)/pip --disable-pip-version-check
# A plain path entry, so that what is built later beside the packages is found, too.
EDITABLE := --no-build-isolation --config-settings editable_mode=compat --editable . --editable guests
C_SOURCES := $(wildcard ninepd/*.c)
# Some of these are compiled, too: setup.py says which.
PY_SOURCES := $(wildcard ninepd/*.py ninepd/export/*.py ninepd/ops/*.py ninepd/p9/*.py)
C_FILES := $(C_SOURCES) \
	$(wildcard guests/ninepd_guests/*.c bench/*.[ch] fuzz/*.[ch] tests/support/*.c)

.PHONY: all bench clean deb demo demo-guest format fuzz fuzz-coverage fuzz-replay guests lint soak \
	test test-guest test-quick wheel
.DELETE_ON_ERROR:

all: $(VENV)/built

# Ask for a boot of a guest: a tour, or with DIR=... a shell with that directory on /mnt. What mypyc
# compiles takes minutes, so a demo does without unless it is there.
demo: $(VENV)/packages
	@echo 'ninepd: step 1 of 2: a virtual environment with the daemon, and meanwhile a guest'
	@$(MAKE) --no-print-directory --jobs=2 demo-guest \
		$(or $(wildcard $(VENV)/built),$(VENV)/plain)
	@echo 'ninepd: step 2 of 2: the demo'
	@$(BIN)/ninepd demo $${DIR:+"$$DIR"}

demo-guest: $(VENV)/packages
	@PYTHONPATH=guests $(PYTHON) -m ninepd_guests.tools demo

# Everything, booted guests included: two halves at once, for each keeps one CPU busy. PYTEST_ARGS
# narrows it down, to one run.
test: lint guests
ifdef PYTEST_ARGS
	$(BIN)/pytest $(PYTEST_ARGS)
else
	@$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=line test-guest test-quick
endif

# Its folders have a parent of their own: for some tests other users may enter it, for others not. The
# name is short, for there are sockets in them.
test-guest: $(VENV)/built
	@mkdir -p -m 755 $(GUEST_FOLDERS)
	PYTEST_DEBUG_TEMPROOT=$(GUEST_FOLDERS) $(BIN)/pytest tests/guest $(PYTEST_ARGS)

# All but the booted guests.
test-quick: $(VENV)/built
	$(BIN)/pytest --ignore=tests/guest $(PYTEST_ARGS)

# A million attempts to race the host, of which `make test` makes ten thousand.
soak: $(VENV)/built
	NINEPD_RACES=1000000 $(BIN)/pytest -s tests/test_races.py $(PYTEST_ARGS)

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

# On two CPUs for ten minutes, or FUZZ_SECONDS; what crashed is in build/fuzz/crashes. FUZZ_ARGS
# narrows it down: '--only ring'.
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/fuzz
	@$(BIN)/python -m fuzz.run --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

# One input once more, or several.
fuzz-replay: $(VENV)/built
	@$(BIN)/python -m fuzz.replay $(FILE)

# Which lines the corpora reach.
fuzz-coverage: $(VENV)/fuzz
	@$(BIN)/python -m fuzz.coverage

# QEMU, kernels and User-Mode Linux, in a cache outside the tree.
guests: $(VENV)/built
	@$(BIN)/python -m ninepd_guests.tools all

# Wheels in dist/ that install without a compiler, for each interpreter of PYTHONS.
PYTHONS ?= $(PYTHON)
wheel: $(VENV)/base
	@PYTHON=$(PYTHON) contrib/setup-debian.sh wheel
	@$(PIP) install "pip>=25.1" && $(PIP) install --group wheel
	@contrib/wheels.sh $(BIN) $(PYTHONS)

# A Debian package in dist/, of the release that this runs on, and its source package.
deb: $(VENV)/base
	@PYTHON=$(PYTHON) contrib/setup-debian.sh deb
	@$(PIP) install "pip>=25.1"
	@contrib/deb.sh $(BIN)

clean:
	rm -rf $(VENV) build dist *.egg-info guests/build guests/*.egg-info ninepd/_libvring.* *.so
	find ninepd -name '*.so' -delete

$(VENV)/packages: contrib/setup-debian.sh
	@echo 'ninepd: looking for the system packages that this needs'
	@PYTHON=$(PYTHON) contrib/setup-debian.sh demo
	@mkdir -p $(VENV) && touch $@

$(VENV)/base: pyproject.toml guests/pyproject.toml | $(VENV)/packages
	@echo 'ninepd: making the virtual environment $(VENV)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "ninepd: fetching Python's packages and compiling the C parts"
	@$(PIP) install 'cffi>=1.17' 'setuptools>=77'
	@NINEPD_MYPYC=0 $(PIP) install $(EDITABLE)
	@touch $@

$(VENV)/plain: $(VENV)/base setup.py $(C_SOURCES) ninepd/_vring_build.py
	@NINEPD_MYPYC=0 NINEPD_WERROR=1 $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/installed: $(VENV)/base
	@PYTHON=$(PYTHON) contrib/setup-debian.sh test
	@echo 'ninepd: fetching the packages of development'
	@$(PIP) install --upgrade 'pip>=25.1'
	@$(PIP) install --group dev
	@touch $@

$(VENV)/fuzz: $(VENV)/built
	@PYTHON=$(PYTHON) contrib/setup-debian.sh fuzz
	@echo 'ninepd: fetching the packages of fuzzing'
	@$(PIP) install --group fuzz
	@touch $@

$(VENV)/built: $(VENV)/installed setup.py $(C_SOURCES) $(PY_SOURCES) ninepd/_vring_build.py
	@echo 'ninepd: compiling with mypyc (some minutes)'
	@NINEPD_WERROR=1 $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
