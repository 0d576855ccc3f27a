"""What a frozen language model makes of a few fixed tokens: what tells it from another with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adalink.attach import Attachment
from adalink.existing import is_encoder_decoder
from adalink.sketch import Sketch
from adalink.tokens import BASE_ROW, TEXT, TokenMap

__all__ = ["sketch_of_states"]

N_TOKENS, N_DECODED, N_VALUES = 12, 4, 64


@torch.no_grad()
def sketch_of_states(attachment: Attachment, image_ids: Sequence[int]) -> dict[str, Sketch]:
    """`states`: the last hidden states of the stack, without any adapter (of an encoder-decoder model, what its decoder gives).

    {} for a model whose weights are not there, or that does not run on tokens alone.
    """
    model: Any = attachment.model
    if any(parameter.is_meta for parameter in model.parameters()):
        return {}
    device = next(attachment.stack.parameters()).device
    allowed = [token for token in range(attachment.anatomy.vocabulary) if token not in image_ids][:50_000]
    ids = torch.tensor([[allowed[(7919 * i + 11) % len(allowed)] for i in range(N_TOKENS)]], device=device)
    token_map = TokenMap(torch.full_like(ids, TEXT), torch.full((1,), BASE_ROW, device=device), serving=frozenset())
    has_decoder = is_encoder_decoder(model) and not image_ids
    call, given = (model, {"decoder_input_ids": ids[:, :N_DECODED]}) if has_decoder else (attachment.stack, {})
    try:
        with attachment.bind(token_map), torch.autocast(device.type, enabled=False):
            output = call(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    except Exception:  # of any model that needs more than tokens: it is bound by what else is known of it
        return {}
    found = getattr(output, "logits", None)
    states = getattr(output, "last_hidden_state", None) if found is None else found
    return {} if states is None else {"states": Sketch.of(states, N_VALUES)}
