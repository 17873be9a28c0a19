# Everything a clone needs: `make demo` and `make test` set up what they use.
# Overridable: PYTHON (3.11 or newer, as transformers 5.23 asks), VENV, PYTEST_ARGS.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PYTEST_ARGS ?=
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: help cluster demo test test-all lint bench fields clean system
help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

system: ## name, or as root install, what Debian packages are missing
	@bash tools/system-packages.sh "$(PYTHON)"

$(VENV)/.light: pyproject.toml constraints.txt | system
	@[ -n "$(PYTHON)" ] || { echo "error: still no Python 3.11 or newer: this system's python3" \
		"is older; install one, or set PYTHON=..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.train: $(VENV)/.light
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[train,dev]'
	@# Bytecode once, so that no start pays for it (some environments do not write any).
	@$(BIN)/python -m compileall -q -j 2 $(VENV)/lib launcher >/dev/null || true
	@touch $@

demo: $(VENV)/.train ## fine-tune the recipe tiny on two CPU ranks under FSDP
	$(BIN)/sftlaunch --gpus 2 --strategy fsdp --device cpu

lint: $(VENV)/.train ## ruff, mypy, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

cluster: system ## what the Slurm and Docker tests need, installed where we are root
	@bash tools/system-packages.sh "$(PYTHON)" servers

test: lint cluster ## all checks of a commit: lint, light tests, a slice of the real-engine tests
	$(BIN)/python -m pytest -m "not slow" -q $(PYTEST_ARGS)

test-all: lint cluster ## the same with the long matrices
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

bench: $(VENV)/.train ## figures of docs/ and bench/, made again
	$(BIN)/python -m bench.startup
	$(BIN)/python -m bench.data_check
	$(BIN)/python -m bench.first_step
	$(BIN)/python -m bench.matrix --write
	$(BIN)/python -m bench.parity --write
	$(BIN)/python -m bench.resume --write
	$(BIN)/python -m bench.faults --write
	$(BIN)/python -m bench.overhead
	$(BIN)/python -m bench.exits

fields: $(VENV)/.train ## the list of SFTConfig fields, after TRL moved
	$(BIN)/python -m launcher.train.fields > launcher/spec/sft_fields.json

clean: ## what make made, but not runs
	rm -rf $(VENV) dist build
