"""The slots of eP-ALM: without a position, hidden below their window, and one for each of several encoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inject_models import LAYERS, attached, method
from tiny import DECODERS, EXACT, FAMILIES, positions, taps, tiny
from torch import Tensor, nn

from adalink import BASE_ROW, EPALM, PAD, PERCEPT, PROMPT, TEXT, AdaLink, Adapter, Method, Prompt, TokenMap

ON_DECODERS = pytest.mark.parametrize("family", DECODERS)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_below_the_window_text_is_what_it_is_in_the_bare_model(family: str, explicit: bool) -> None:
    """Hidden slots without positions leave no trace: the strongest thing that can be said of masks and positions at once."""
    model = tiny(family, n_layers=LAYERS)
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(3, 64, (2, 6), generator=generator)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    ids, domain = torch.cat([torch.zeros(2, 1, dtype=torch.int64), text], 1), torch.cat([torch.full((2, 1), PERCEPT), torch.where(mask == 1, TEXT, PAD)], 1)
    with_slot = torch.cat([torch.ones(2, 1, dtype=torch.int64), mask], 1)
    attachment = attached(model, {"epalm": method((2, 3))})
    layer = attachment.stack.get_submodule(attachment.anatomy.layers[2])
    read: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))

    def states(ids: Tensor, mask: Tensor, row: int) -> Tensor:
        own = torch.full_like(ids, TEXT) if row == BASE_ROW else domain
        with attachment.bind(TokenMap(own, torch.full((2,), row), {"image_taps": taps(2)})), torch.no_grad():
            if model.config.is_encoder_decoder:
                model(input_ids=ids, attention_mask=mask, decoder_input_ids=torch.zeros(2, 1, dtype=torch.int64))
            else:
                model(input_ids=ids, attention_mask=mask, position_ids=positions(mask) if explicit else None)
        return read.pop()

    bare, adapted = states(text, mask, BASE_ROW), states(ids, with_slot, 0)[:, 1:]
    torch.testing.assert_close(adapted[mask == 1], bare[mask == 1], rtol=0, atol=EXACT[family])


@ON_DECODERS
def test_a_prompt_without_positions_leaves_the_text_where_it_was(family: str) -> None:
    """Seen at the module that turns position ids into vectors or rotations."""
    model = tiny(family)
    text = torch.tensor([[5, 6, 7, 8]])
    domain = torch.tensor([[PROMPT, PROMPT, TEXT, TEXT, TEXT, TEXT]])
    seen: dict[str, Tensor] = {}
    for kind in ("none", "counted"):
        attachment = attached(model, {"prompt": Prompt(length=2, init_std=0.5, positions=kind)})  # type: ignore[arg-type]
        part = attachment.anatomy.positions
        assert part is not None
        watch = attachment.stack.get_submodule(part.module).register_forward_hook(lambda module, args, out, kind=kind: seen.__setitem__(kind, first(out)))
        with attachment.bind(TokenMap(domain, torch.tensor([0]))), torch.no_grad():
            model(input_ids=nn.functional.pad(text, (2, 0)))
        attachment.detach()
        watch.remove()
    attachment = attached(model, {"adalink": AdaLink(rank=2, modalities=("text",))})
    part = attachment.anatomy.positions
    assert part is not None
    attachment.stack.get_submodule(part.module).register_forward_hook(lambda module, args, out: seen.__setitem__("bare", first(out)))
    with attachment.bind(TokenMap(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([BASE_ROW]))), torch.no_grad():
        model(input_ids=text)
    torch.testing.assert_close(seen["none"][:, 2:], seen["bare"], rtol=0, atol=0)
    assert not torch.equal(seen["counted"][:, 2:], seen["bare"])
    neutral = seen["bare"][:, :1].expand(-1, 2, -1) if part.kind == "rotary" else torch.zeros_like(seen["none"][:, :2])
    assert torch.equal(seen["none"][:, :2], neutral)  # no vector, or the rotation of position 0, which is none


def first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@ON_DECODERS
def test_two_encoders_live_in_one_adapter(family: str) -> None:
    """A second tower of any modality: pooled features [B, L, D] under a name of its own, a slot of its own, another window."""
    model = tiny(family, n_layers=LAYERS)
    methods: dict[str, Method] = {
        "prompt": Prompt(length=2, init_std=0.5, positions="none"),
        "seen": method((1, 3), "causal"),
        "heard": EPALM(layers=(2, 4), n_taps=3, connector="shared", source="audio_taps", slot=6),
    }
    attachment = attached(model, methods)
    slots = [slot.domain for slot in Adapter(methods, attachment.anatomy).slots]
    assert slots == [PERCEPT, 6, PROMPT]
    text = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    domain = torch.cat([torch.tensor([[PERCEPT, 6, PROMPT, PROMPT]] * 2), torch.full((2, 5), TEXT)], 1)
    ids = nn.functional.pad(text, (4, 0))
    sound = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(8), dtype=torch.float64)

    def bound(image: Tensor, sound: Tensor) -> TokenMap:
        return TokenMap(domain, torch.zeros(2, dtype=torch.int64), {"image_taps": image, "audio_taps": sound})

    def logits(image: Tensor, sound: Tensor) -> Tensor:
        with attachment.bind(bound(image, sound)), torch.no_grad():
            found: Tensor = model(input_ids=ids).logits[:, -1]
        return found

    plain = logits(taps(2), sound)
    assert (logits(taps(2, seed=9), sound) - plain).abs().max() > 1e-3
    assert (logits(taps(2), sound + 1) - plain).abs().max() > 1e-3
    same: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    with attachment.bind(bound(taps(2), sound)):
        mask = torch.ones_like(ids)
        cached, uncached = (model.generate(ids, attention_mask=mask, use_cache=use_cache, **same) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
