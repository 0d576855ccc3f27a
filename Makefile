# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`. Both set everything up in .venv first.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready

.PHONY: demo docs test test-all test-processors lint clean
.DELETE_ON_ERROR:

demo: $(READY)
	rm -rf runs/demo
	HF_HUB_OFFLINE=1 $(VENV)/bin/adalink demo --out runs/demo

# Bytecode is written, wherever PYTHONDONTWRITEBYTECODE is set: pytest rewrites every test file's assertions, which takes each process seconds.
test: $(READY)
	PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --durations=20

# The slow tests too: every method on every family, where `make test` runs a sample that covers each of them.
test-all: $(READY)
	PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --durations=20 -m "slow or not slow"

# The tests that compare numbers, as processors without AVX-512 and without AVX2 would round them, and with more threads. The two share the cases of a test.
NUMBERS := tests/test_invariants.py tests/adalink/methods tests/adalink/existing/test_existing*.py tests/adalink/lifecycle/test_fold.py tests/adalink/lifecycle/test_merge*.py \
	tests/multimodal/batches/test_packing*.py tests/multimodal/batches/test_joined_rows.py tests/multimodal/loss/test_last_layer.py \
	tests/multimodal/loss/test_word_*.py tests/multimodal/generation/test_decoding.py tests/multimodal/generation/test_generate.py \
	tests/multimodal/encoders/test_vision*.py tests/multimodal/existing/test_family*.py tests/multimodal/training/test_train.py \
	tests/tasks/runs/test_vqa_classify.py

test-processors: $(READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --half 0 $(NUMBERS)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=4 OMP_WAIT_POLICY=passive ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --half 1 $(NUMBERS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# Warnings are errors: a name that is gone, a link to nowhere, a docstring that cannot be read.
docs: $(DOCS_READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/sphinx-build -W --keep-going --quiet -b html examples/docs build/docs
	@echo "open build/docs/index.html"

clean:
	rm -rf $(VENV) build *.egg-info

# torch first and by itself: a range in another package's needs would let pip choose a newer, much larger build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --no-deps --upgrade --target $(VENV)/torchao torchao  # beside the others: see tests/support/quantiser.py
	touch $(READY)

$(DOCS_READY): $(READY)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $(DOCS_READY)
