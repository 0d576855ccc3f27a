"""Every method on a base in bfloat16 and in float16, beside the same weights in float32: how far logits and gradients are off, in percent of their norms.

    PYTHONPATH=.:tests:tests/support python tests/benchmarks/studies/half.py

Of the four families of decoders the largest, and of T5. A NaN would be printed as one.
"""

from __future__ import annotations

import multimodal.language  # isort: skip  # before transformers: it makes torchvision importable

import torch
from test_invariants import HALF, METHODS_UNDER_TEST, half_errors
from tiny import DECODERS

from tasks.commands.train import results_table


def main() -> None:
    """Print the table, a row for each method."""
    assert multimodal.language
    torch.set_num_threads(1)
    rows = {}
    for name in METHODS_UNDER_TEST:
        found: dict[str, float] = {}
        for who, families in (("", DECODERS), ("T5 ", ("t5",))):
            for dtype in HALF:
                errors = torch.tensor([half_errors(family, name, dtype) for family in families])
                found |= {f"{who}{str(dtype)[6:]} {what}": 100 * float(worst) for what, worst in zip(("logits", "gradients"), errors.amax(0), strict=True)}
        rows[name] = found
    print(results_table(rows))


if __name__ == "__main__":
    main()
