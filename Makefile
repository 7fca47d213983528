# On a fresh machine `make run` and `make test` do all the set-up, in .venv.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*)

.PHONY: run test lint clean

run: .venv/installed
	@rm -rf runs/first
	$(BIN)/forde-fast compare --out runs/first

test: .venv/installed-tests
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: .venv/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Without build isolation: the extension is built against the torch that it will run with.
.venv/installed: constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt "setuptools>=77" wheel ninja torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e .
	touch $@

# The extension is there already: only what the tests need besides is added.
.venv/installed-tests: .venv/installed
	FORDE_FAST_BUILD=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info forde_fast/_*.so
