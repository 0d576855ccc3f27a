#!/bin/sh
# Measures one GPU in at most eight minutes, and writes tests/benchmarks/RESULTS-GPU.md. `gpu.sh --tiny` does all of it in miniature on a CPU.
# PYTHON names the interpreter; by default that of `make`. pip install 'adalink[bench,quantise]' liger-kernel for every row.
cd "$(dirname "$0")/../.." || exit 1
[ -n "$PYTHON" ] || PYTHON=.venv/bin/python
PYTHONPATH=. HF_HUB_OFFLINE=1 exec "$PYTHON" tests/benchmarks/gpu.py "$@"
