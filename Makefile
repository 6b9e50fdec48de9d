# `make demo` and `make test` set up .venv themselves; set-up runs once, and again when pyproject.toml changes.

PYTHON ?= python3
TORCH ?=
PIP_ARGS ?=
export PYTHON TORCH PIP_ARGS

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test format build clean

help:
	@echo "make demo    run examples/demo.toml"
	@echo "make test    check format, lint and types, then run the tests"
	@echo "make format  format the code and apply the safe lint fixes"
	@echo "make build   build the wheel and the sdist into dist/"
	@echo "make clean   remove .venv, dist/ and caches (runs/ is kept)"
	@echo
	@echo "PYTHON=... picks the interpreter, TORCH=... the version of torch, PIP_ARGS=... goes to pip"

demo: .venv/.stamp-run
	@.venv/bin/lamina run examples/demo.toml

test: .venv/.stamp-dev
	@scripts/check

format: .venv/.stamp-dev
	@.venv/bin/ruff check --fix --exit-zero --quiet
	@.venv/bin/ruff format

build: .venv/.stamp-dev
	@rm -rf dist
	@.venv/bin/python -m build

clean:
	rm -rf .venv dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.stamp-run: pyproject.toml
	@scripts/setup run

.venv/.stamp-dev: pyproject.toml
	@scripts/setup dev
