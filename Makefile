# Every target works alone on a fresh machine: the environment is made when it is missing or outdated.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs clean

.venv/installed: requirements.txt setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (about two minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: .venv/installed
	@$(BIN)/python demo.py

test: .venv/installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

docs: .venv/installed
	@$(BIN)/python -m mkdocs build --strict --quiet && echo "written: runs/site/index.html"

clean:
	rm -rf .venv runs/demo .pytest_cache .ruff_cache *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
