# Each goal makes .venv first if there is none. PYTHON chooses the interpreter (3.11 to 3.13).

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest
# How many tests run side by side; tests/conftest.py says how many by itself.
WORKERS ?= auto
# Comparisons of speed, for which nothing else may run.
TIMED := tests/peers/test_speed.py tests/peers/test_gkd.py

# What `make smoke` runs: acceptance rules, sampling, divergences, and the decoding loop with its exactness.
CORE := $(addprefix tests/test_,rules.py sampling.py divergences.py loop.py exactness.py)
# The slowest of them, left to `make test`.
SPARED := another_vocabulary or fill_the_capacity or callers_arrays or depend_on_its_batch or after_every_block

.PHONY: quickstart checkpoint accelerator smoke test test-ci test-all test-peers test-parity speculators check tables
.DEFAULT_GOAL := test

quickstart: $(VENV)/.installed
	$(RUN) -m specjax.main --config=configs/quickstart.py --workdir=runs/quickstart

# A real chat model of 98 MB, in checkpoints/.
checkpoint: $(RUN)
	$(RUN) launch/checkpoint.py checkpoints

# What specjax reaches on this machine's GPU or TPU, in 8 minutes; SMOKE=1 runs tiny shapes on any machine.
accelerator: $(VENV)/.installed-dev
	SMOKE=$(SMOKE) launch/accelerator.sh

# Under a minute on 2 cores.
smoke: $(VENV)/.installed-dev
	$(PYTEST) -n 2 -m "not slow and not peers" -k "not ($(SPARED))" $(CORE)

test: $(VENV)/.installed-dev
	$(PYTEST) -n $(WORKERS) -m "not slow and not peers"

# What every change has to pass: all but the longest runs and some slow cases (tests/conftest.py). To check the types of
# arguments, as the quick tests do, takes a sixth of the time of the slow ones.
test-ci: check $(VENV)/.installed-tpu-compiler test
	$(PYTEST) -n $(WORKERS) -m "slow and not peers and not thorough" --jaxtyping-packages=

test-all: check $(VENV)/.installed-tpu-compiler
	$(PYTEST) -n $(WORKERS) -m "not peers"

test-peers: test-parity
	$(PYTEST) -m peers $(TIMED)

# The comparisons of logits, texts and files, without those of speed.
test-parity: $(VENV)/.installed-peers
	-$(MAKE) speculators  # its tests are skipped where it cannot be installed
	$(PYTEST) -n $(WORKERS) -m "peers and not slow" $(TIMED:%=--ignore=%) tests/peers

# The package with the draft models of vLLM's project, for tests/peers/test_speculators.py; of its own dependencies,
# only what these models import. Its transformers is older than the peers', so it has an environment of its own.
speculators: $(VENV)-speculators/.installed

$(VENV)-speculators/.installed: requirements-speculators.txt | $(RUN)
	$(PYTHON) -m venv $(VENV)-speculators
	$(VENV)-speculators/bin/python -m pip install --quiet --requirement $<
	$(VENV)-speculators/bin/python -m pip install --quiet --no-deps speculators==0.9.0 hs-connectors==0.9.0
	touch $@

check: $(VENV)/.installed-dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(PYTEST) tests/test_structure.py

# The tables of the README and of the pages in configs/, from the committed records.
tables: $(VENV)/.installed
	$(RUN) -m configs.records.sync README.md $(wildcard configs/*/README.md) configs/records

$(RUN):
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 on the PATH; install one, or make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(RUN)
	$(RUN) -m pip install --quiet --requirement $<
	touch $@

$(VENV)/.installed-%: requirements-%.txt $(VENV)/.installed | $(RUN)
	$(RUN) -m pip install --quiet --requirement requirements.txt --requirement $<
	touch $@

# The comparison is driven by pytest.
$(VENV)/.installed-peers: $(VENV)/.installed-dev

# In a folder of its own: on the path of every run, it would have JAX look for a TPU.
$(VENV)/.installed-tpu-compiler: requirements-tpu-compiler.txt $(VENV)/.installed-dev
	$(RUN) -m pip install --quiet --no-deps --upgrade --target $(VENV)/tpu-compiler --requirement $<
	touch $@
