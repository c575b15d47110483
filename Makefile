# DS01: `make` lists what there is.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SIM_OUT := build/sim
HOSTS ?= 1

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: env
env: $(VENV)/.stamp ## Create .venv with every tool pinned

$(VENV)/.stamp: requirements-dev.txt roles/ds01_runtime/files/requirements.txt
	@echo "== environment: $(VENV) (about 20 s)"
	@lab/bootstrap-python $(PYTHON) $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.PHONY: sim
sim: ## Build the simulated NVIDIA driver into build/sim
	@$(MAKE) --no-print-directory -C lab/sim OUT=$(CURDIR)/$(SIM_OUT)

.PHONY: lab-up
lab-up: env sim ## Start HOSTS=n lab hosts (default 1)
	@lab/lab up --hosts $(HOSTS)

.PHONY: lab-down
lab-down: env ## Stop the lab hosts, and the engine if the lab started it
	@lab/lab down

