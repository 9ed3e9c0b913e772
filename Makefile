# Every target works alone on a fresh machine: the environment is made when it is missing or outdated.
PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest/bin
TESTS := -n 2 --dist worksteal

.PHONY: demo test test-full test-lowest endurance lint docs clean

.venv/installed: requirements.txt setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (about two minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@

# The oldest versions that requirements.txt allows, of everything that it names.
.venv-lowest/installed: requirements.txt setup.py
	@test -x $(LOWEST)/python || $(PYTHON) -m venv .venv-lowest
	@echo "installing the lowest versions into .venv-lowest (about two minutes the first time)"
	@sed 's/>=/==/' requirements.txt > .venv-lowest/requirements.txt
	@$(LOWEST)/python -m pip install -qq --disable-pip-version-check -r .venv-lowest/requirements.txt -e '.[dev]'
	@touch $@

demo: .venv/installed
	@$(BIN)/python demo.py

test: .venv/installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) -m "not slow"

test-full: .venv/installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS)

test-lowest: .venv-lowest/installed
	@OMP_NUM_THREADS=1 $(LOWEST)/python -m pytest $(TESTS) -m "not slow"

# Kills, damaged files and failing environments; counts of several times add up. Not a part of the tests.
MINUTES ?= 60
endurance: .venv/installed
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/endurance.py --minutes $(MINUTES)

lint: .venv/installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

docs: .venv/installed
	@$(BIN)/python -m mkdocs build --strict && echo "written: runs/site/index.html"

clean:
	rm -rf .venv .venv-lowest runs/demo .pytest_cache .ruff_cache *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
