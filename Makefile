# Every target sets up what it needs and does nothing twice.
.DELETE_ON_ERROR:
.PHONY: demo learn test test-slow lint bench clean help

# Containers often set it. Without bytecode every process of a cluster compiles vLLM and torch anew: 20 s of CPU each.
unexport PYTHONDONTWRITEBYTECODE

VENV   := .venv
PYTHON := $(VENV)/bin/python
READY  := $(VENV)/.ready
# GPU machines: `make demo DEVICE=gpu CONFIG=configs/...`. The default is the CPU.
DEVICE ?= cpu
CONFIG ?= configs/demo.yaml
ARGS   ?=

# CPU builds of torch: a local directory of wheels where PIP_FIND_LINKS names one, else PyTorch's CPU index.
ifeq ($(DEVICE),cpu)
  ifneq ($(strip $(PIP_FIND_LINKS)),)
    TORCH := UV_FIND_LINKS="$(PIP_FIND_LINKS)"
    PIN   := "torch==2.13.0+cpu"
  else
    TORCH := UV_TORCH_BACKEND=cpu
    PIN   :=
  endif
else
  TORCH := UV_TORCH_BACKEND=auto
  PIN   :=
endif

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1	/'

$(READY): pyproject.toml overrides.txt
	@command -v uv >/dev/null 2>&1 || python3 -m pip install --quiet --root-user-action=ignore uv \
	  || python3 -m pip install --quiet --user --break-system-packages uv
	@UV=$$(command -v uv || echo "python3 -m uv"); set -e; \
	  [ -x $(PYTHON) ] || $$UV venv --quiet --seed --python ">=3.11,<3.13" $(VENV); \
	  echo "Installing into $(VENV) (about 3.6 GB; 15 s from a warm cache) ..."; \
	  $(TORCH) $$UV pip install --quiet --python $(PYTHON) --overrides overrides.txt $(PIN) -e ".[$(DEVICE),dev]"
	@touch $@

demo: $(READY)  ## start the demo cluster (TP=2), run 64 tasks x 8, print what came out, stop everything
	@$(VENV)/bin/rollout demo --config $(CONFIG) $(ARGS)

learn: $(READY)  ## GRPO on two cores: the demo model learns to calculate, in about 6 minutes; see out/learn
	@$(PYTHON) -m examples.calculator.train $(ARGS)

test: $(READY)  ## the tests, on a real TP=2 engine; see test-slow for those that start more clusters
	@$(PYTHON) -m pytest -n 2 --dist loadfile --ignore tests/integration $(ARGS)
	@$(PYTHON) -m pytest tests/integration $(ARGS)

test-slow: $(READY)  ## what `make test` leaves out: more clusters, deployed by Serve, cut checkpoints, killed ranks
	@$(PYTHON) -m pytest -m slow tests/integration $(ARGS)

lint: $(READY)  ## ruff and mypy
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

bench: $(READY)  ## figures against the raw engine and against peers, in out/bench/summary.json
	@$(PYTHON) -m benchmarks $(ARGS)

clean:  ## remove what the targets above made (the virtual environments too)
	rm -rf $(VENV) .bench out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .rollout
