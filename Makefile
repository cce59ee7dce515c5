# On a machine with Python 3.11 and pip: `make install`, `make figures` and `make test`; `make quick` while you work.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install figures report test quick benchmarks clean

install: .venv/ready

figures: .venv/ready
	@PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores all
	@echo "The figures are in results/, a folder for each study."

report: .venv/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores all --report results/report.html

test: .venv/ready-for-tests
	PATH="$(CURDIR)/$(BIN):$$PATH" pytest -n 2 --dist worksteal

quick: .venv/ready-for-tests
	PATH="$(CURDIR)/$(BIN):$$PATH" pytest -m quick -n 2 --dist worksteal

benchmarks: .venv/ready
	$(BIN)/python benchmarks/statistics_speed.py

.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "The pins are for Python 3.11 to 3.13, this is " + sys.version.split()[0] + ": say make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.venv/ready-for-tests: .venv/ready requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

clean:
	rm -rf .venv .snakemake .pytest_cache .ruff_cache .mypy_cache
