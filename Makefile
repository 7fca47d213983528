# On a fresh machine `make run` and `make test` do all the set-up, in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Without build isolation: the extension is built against the torch that it will run with. Python compiles of a package
# what is imported, when it is: all of torch would take as long as unpacking it.
INSTALL := $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*)

.PHONY: run test lint clean

run: .venv/installed
	@rm -rf runs/demo
	$(BIN)/forde-fast compare --out runs/demo
	@echo 'Next: $(BIN)/forde-fast report runs/demo    one page of all of it, runs/demo/report/index.html'
	@echo '      $(BIN)/forde-fast train --help        your own data, model and method; README.md has examples'

test: .venv/installed-tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: .venv/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo '1 of 3: torch, and what builds the C++ extension'
	@$(INSTALL) "setuptools>=77" wheel ninja torch numpy
	@echo '2 of 3: the C++ extension, and the other packages: a minute or two'
	@$(INSTALL) --no-build-isolation -e .
	@echo '3 of 3: installed'
	@touch $@

# The extension is there already: only what the tests need besides is added.
.venv/installed-tests: .venv/installed
	@FORDE_FAST_BUILD=0 $(INSTALL) --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info forde_fast/_*.so
