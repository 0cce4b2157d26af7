# `make demo` sets up and runs the main job; `make test` sets up and passes the tests. Nothing else is needed.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN     = $(VENV)/bin

.PHONY: demo test nightly lint env golden clean

# A CPU build of torch first, by exact version: a looser request can fetch gigabytes of CUDA.
$(VENV)/.ready: pyproject.toml examples/gdnir_example/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# The tests need more: transformers to compare with, triton to compile with.
$(VENV)/.test-ready: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ./examples/gdnir_example
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "triton==3.7.1" -e ".[dev]"
	touch $@

env: $(VENV)/.test-ready

demo: $(VENV)/.ready
	@echo "== The layer as it is written: one GDN layer of Qwen3-Next, in ops"
	@$(BIN)/gdnir dump qwen3-next --dtype f32 --no-lower
	@echo "== Lowered for this machine"
	@$(BIN)/gdnir dump qwen3-next --dtype f32
	@echo "== Lowered for an H200, from here"
	@$(BIN)/gdnir dump qwen3-next --platform cuda:sm_90
	@echo "== Run: 512 tokens of prefill, 16 of decode, checked against a float64 reference"
	@$(BIN)/gdnir run qwen3-next --tokens 512 --decode 16 --check
	@echo "Next: $(BIN)/gdnir why qwen3-next --platform cuda:sm_90"

test: $(VENV)/.test-ready
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/interpreter
	$(BIN)/python -m pytest -n auto tests --ignore=tests/interpreter

nightly: $(VENV)/.test-ready
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n auto tests --ignore=tests/interpreter

lint: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

golden: $(VENV)/.test-ready
	$(BIN)/python -m pytest tests/test_golden.py --update-golden

clean:
	rm -rf $(VENV)
