"""Several texts in one row with a prefix: its slots are shared, and each text's loss is what it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import EXACT, excite, tiny

from adalink import PREFIX, TEXT, Adapter, Anatomy, Bottleneck, Gated, Prefix, TokenMap, attach
from multimodal.batches.collate import collate
from multimodal.batches.packing import arrangement, pack_rows, separate_rows
from multimodal.batches.tokenize import Row


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_packed_texts_read_the_prefix_as_texts_of_their_own_do(family: str) -> None:
    model: Any = tiny(family)
    adapter = Adapter({"prefix": Prefix(length=2, form="mlp", init_std=0.5, hidden=6)}, Anatomy.read(model)).double()
    excite(adapter)
    assert arrangement(model, adapter)[0] is pack_rows
    texts = [Row((0, 0, 7, 8, *end), (PREFIX, PREFIX, *[TEXT] * (2 + len(end))), (3 + len(end),), (5,)) for end in ((9, 10), (11,))]
    attachment = attach(model, adapter)
    logits = []
    for rows in (pack_rows(texts), separate_rows(texts)):
        batch = collate(rows, [0] * len(rows), torch.zeros(1, 1, 1), kind="patches", side="right", pad_id=0)
        with attachment.bind(TokenMap(batch.domain, torch.zeros(len(rows), dtype=torch.int64))), torch.no_grad():
            out = model(input_ids=batch.ids, attention_mask=batch.attention(torch.float64), position_ids=batch.position, use_cache=False).logits
        logits.append(torch.take_along_dim(out, batch.source[..., None], 1).flatten(0, 1))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=EXACT[family])


def test_a_gate_over_the_sequence_reads_its_row_so_texts_are_not_packed() -> None:
    model: Any = tiny("gpt2")
    adapter = Adapter({"gated": Gated(inner=Bottleneck(width=4), mean="sequence")}, Anatomy.read(model))
    arrange, note = arrangement(model, adapter)
    assert arrange is separate_rows
    assert "a gate the row" in note
