# DS01: `make` lists what there is.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SIM_OUT := build/sim
HOSTS ?= 1
# East and west of UTC, where a local time taken for UTC ends a hold early or late.
ZONES := Europe/Berlin America/New_York

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: env
env: $(VENV)/.stamp ## Create .venv with every tool pinned

$(VENV)/.stamp: requirements-dev.txt roles/ds01_runtime/files/requirements.txt
	@echo "== environment: $(VENV) (about 20 s)"
	@lab/bootstrap-python $(PYTHON) $(VENV)
	@$(BIN)/pip install --quiet --quiet --disable-pip-version-check -r requirements-dev.txt
	@# ansible-lint checks the arguments of our modules only where it can import what they import.
	@cd $$($(BIN)/python -c 'import ansible.module_utils as m; print(m.__path__[0])') && \
	  ln -sfn $(CURDIR)/plugins/module_utils/ds01 ds01 && ln -sfn $(CURDIR)/plugins/module_utils/ds01_module.py .
	@touch $@

.PHONY: sim
sim: ## Build the simulated NVIDIA driver into build/sim
	@$(MAKE) --silent --no-print-directory -C lab/sim OUT=$(CURDIR)/$(SIM_OUT)

.PHONY: promtool
promtool: ## Fetch Prometheus' checker of metrics and alert rules into build/promtool
	@lab/promtool build/promtool

.PHONY: lab-up
lab-up: env sim ## Start HOSTS=n lab hosts (default 1)
	@lab/lab up --hosts $(HOSTS)

.PHONY: lab-down
lab-down: env ## Stop the lab hosts and virtual machines, and the engine if the lab started it
	@lab/lab vm down
	@lab/lab down

.PHONY: demo
demo: env sim ## A lab host, site.yml, a container for alice and a status page
	@lab/demo

.PHONY: lint
lint: env ## ruff, mypy, yamllint and ansible-lint
	@echo "== lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@PATH="$(CURDIR)/$(BIN):$$PATH" yamllint --strict .
	@PATH="$(CURDIR)/$(BIN):$$PATH" ansible-lint --offline -q

.PHONY: unit
unit: env sim promtool ## The tests that need neither engine nor root
	@echo "== unit tests"
	@$(BIN)/pytest -n 2 tests
	@for zone in $(ZONES); do \
	  echo "== unit tests, TZ=$$zone"; \
	  TZ=$$zone $(BIN)/pytest -q -n 2 -m "not robust and not sim" tests/unit || exit; \
	done

.PHONY: molecule
molecule: env sim ## The Molecule scenarios, on lab hosts (make molecule SCENARIO=default for one)
	@$(BIN)/pytest -s molecule $(if $(SCENARIO),-k $(SCENARIO))

.PHONY: vm-test
vm-test: env sim ## A real reboot with cgroup v2, in a virtual machine (12 to 30 minutes; not part of test)
	@$(BIN)/pytest -s -m vm molecule

.PHONY: test
test: ## Everything that CI runs
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory molecule

.PHONY: bench
bench: env sim ## Measure, beside the floor and what users had before
	@$(BIN)/python tests/bench/bench.py

.PHONY: clean
clean: lab-down ## Remove what was built here (the lab's cached image stays)
	rm -rf build $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis inventory/lab
