# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`. Both set everything up in .venv first.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(READY)
	rm -rf runs/demo
	HF_HUB_OFFLINE=1 $(VENV)/bin/adalink demo --out runs/demo

test: $(READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build *.egg-info

# torch first and by itself: a range in another package's needs would let pip choose a newer, much larger build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $(READY)
