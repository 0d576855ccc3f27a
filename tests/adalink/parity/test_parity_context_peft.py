"""Context-PEFT against the authors' code: every file of fixtures/context_peft, in float64, to 1e-10."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from context_peft_case import Case
from context_peft_checks import check_features, check_generation, check_padding, check_routing, check_training, check_variants
from shared import fixtures

FILES = sorted(fixtures("context_peft").glob("*.safetensors"))
CHECKS = (check_features, check_routing, check_training, check_padding, check_variants, check_generation)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_equals_the_released_code(path: Path, check: Callable[[Case], None]) -> None:
    check(Case.read(path))
