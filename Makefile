# make demo       the shipped small model, in full precision and in 4 bits with 30 % of the tokens
# make test       lint, types and tests on the CPU      PYTHON=... JAX_VERSION=... PYTEST_ARGS=...
# make test-gpu   the GPU tests, with the python3 that is active (jax and pytest already there)
# make format     let ruff rewrite the sources
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: demo test test-gpu format
export PYTHON JAX_VERSION ORACLE VENV

demo:
	@python=$$(scripts/environment demo)
	$$python -m quota_jax.cli demo $(DEMO_ARGS)

test:
	@python=$$(scripts/environment test)
	$$python -m ruff check .
	$$python -m ruff format --check .
	$$python -m pyrefly check --python-interpreter-path $$python
	$$python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

test-gpu:
	@python3 -m pytest -m gpu $(PYTEST_ARGS)

format:
	@python=$$(scripts/environment test)
	$$python -m ruff check --fix .
	$$python -m ruff format .

.ONESHELL:
