"""The answer normalisation of the official VQA evaluation, with its quirks."""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = ["clean", "normalize"]

# Source of every table and order here: GT-Vision-Lab/VQA at a013f004, PythonEvaluationTools/vqaEvaluation/vqaEval.py.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset({"a", "an", "the"})
