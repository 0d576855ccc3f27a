"""eP-ALM in a running model: what leaks and what does not, and caches that are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inject_models import LAYERS, attached, method
from tiny import DECODERS, EXACT, INPUTS, excite, positions, rows, run, taps, tiny, token_map
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from adalink import (
    BASE_ROW,
    PAD,
    PERCEPT,
    TEXT,
    AdaLink,
    AdaptedModel,
    Adapter,
    Anatomy,
    AttachError,
    Attachment,
    Method,
    Prompt,
    TokenMap,
    attach,
)
from adalink.attachment.recompute import needs_whole_sequence, reads_later_tokens

ON_DECODERS = pytest.mark.parametrize("family", DECODERS)


@pytest.mark.parametrize(
    ("mask", "layers", "leaks"),
    [("published", (1, 3), True), ("published", (1, 2), True), ("published", (1, 4), False), ("causal", (1, 3), False), ("causal", (0, 4), False)],
)
@ON_DECODERS
def test_the_published_mask_leaks_the_future_and_the_causal_one_does_not(family: str, mask: str, layers: tuple[int, int], leaks: bool) -> None:
    model = tiny(family, n_layers=LAYERS)
    attachment = attached(model, {"epalm": method(layers, mask)})
    ids, domain, padding = rows()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 60 + 3
    with attachment.bind(token_map(domain)):
        one, other = run(model, ids, padding), run(model, changed, padding)
    text = (domain != PAD) & (domain != PERCEPT)
    text[:, -1] = False
    difference = (one - other)[text].abs().max()
    assert (difference > 1e-6) == leaks
    assert (one - other)[:, -1].abs().max() > 1e-3  # the control: the changed token itself is read


@pytest.mark.parametrize(("mask", "sees"), [("published", True), ("causal", False)])
def test_padding_on_the_right_is_read_as_published_and_padding_on_the_left_never(mask: str, sees: bool) -> None:
    model = tiny("opt", n_layers=LAYERS)
    attachment = attached(model, {"epalm": method(mask=mask)})

    def logits(domain: list[int], ids: list[int]) -> Tensor:
        given = torch.tensor([domain])
        with attachment.bind(TokenMap(given, torch.tensor([0]), {"image_taps": taps(1)})):
            result = model(input_ids=torch.tensor([ids]), attention_mask=(given != PAD).long()).logits[0]
        return result[[i for i, one in enumerate(domain) if one == TEXT]]

    alone = logits([PERCEPT, TEXT, TEXT], [0, 5, 6])
    right = logits([PERCEPT, TEXT, TEXT, PAD, PAD], [0, 5, 6, 0, 0])
    left = logits([PAD, PAD, PERCEPT, TEXT, TEXT], [0, 0, 0, 5, 6])
    torch.testing.assert_close(left, alone, rtol=0, atol=1e-12)
    assert ((right - alone).abs().max() > 1e-6) == sees


def stepwise(model: Any, attachment: Attachment, lengths: list[int], attention: str, row: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of the last token after each chunk: with a cache, and of the whole sequence so far without one."""
    model.set_attn_implementation(attention)
    ids, domain, mask = rows()
    n_prompt = ids.shape[1] - 2
    token_map_ = token_map(domain[:, :n_prompt], torch.tensor(row))
    cached, whole, cache, start = [], [], DynamicCache(config=model.config), 0
    with attachment.bind(token_map_), torch.no_grad():
        for length in lengths:
            end = start + length
            here = {"attention_mask": mask[:, :end], "position_ids": positions(mask)[:, start:end]}
            cached.append(model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **here).logits[:, -1])
            here["position_ids"] = positions(mask)[:, :end]
            whole.append(model(input_ids=ids[:, :end], use_cache=False, **here).logits[:, -1])
            start = end
    return cached, whole


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[12, 1, 1], [9, 3, 2], [5, 4, 4, 1]])
@ON_DECODERS
def test_every_step_with_a_cache_equals_the_whole_sequence(family: str, lengths: list[int], attention: str) -> None:
    """Two adapters and a row without one; chunks that begin inside the prompt, and of several tokens."""
    model = tiny(family, n_layers=LAYERS)
    other: dict[str, Method] = {"epalm": method((2, 3)), "adalink": AdaLink(rank=2, modalities=("text",)), "prompt": Prompt(length=2, init_std=0.5)}
    if attention == "eager":  # it computes its softmax in float32, where the least float64 of its mask is minus infinity, and padding NaN
        model = model.float()
    attachment = attached(model, {"epalm": method()}, other)
    cached, whole = stepwise(model, attachment, lengths, attention, [0, 1, BASE_ROW])
    exact = EXACT[family] if attention == "sdpa" else 1e-4
    for one, two in zip(cached, whole, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=exact)


def test_a_cache_that_is_not_recomputed_is_wrong() -> None:
    """The control of the tests above."""
    model = tiny("opt", n_layers=LAYERS)
    attachment = attached(model, {"epalm": method()})
    attachment.at = {port: placed for port, placed in attachment.at.items() if port.side != "cache"}
    for port in [port for port in attachment._ports if port.side == "cache"]:
        attachment._ports.pop(port).remove()
    cached, whole = stepwise(model, attachment, [12, 1, 1], "sdpa", [0, 0, 0])
    assert (cached[-1] - whole[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("mask", ["published", "causal"])
@ON_DECODERS
def test_a_static_cache_and_beams_generate_what_no_cache_does(family: str, mask: str) -> None:
    model = tiny(family, n_layers=LAYERS)
    attachment = attached(model, {"epalm": method(mask=mask), "prompt": Prompt(length=2, init_std=0.5, positions="none")})
    ids, domain, padding = rows()
    same: dict[str, Any] = {"attention_mask": padding, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with attachment.bind(token_map(domain)):
        for beams in (1, 3):
            expected = model.generate(ids, use_cache=False, num_beams=beams, **same)
            assert torch.equal(model.generate(ids, use_cache=True, num_beams=beams, **same), expected)
            assert torch.equal(model.generate(ids, cache_implementation="static", num_beams=beams, **same), expected)


@pytest.mark.parametrize("mask", ["published", "causal"])
@ON_DECODERS
def test_where_several_layers_read_the_slot_a_cache_is_refused_as_published_and_exact_as_causal(family: str, mask: str) -> None:
    model = tiny(family, n_layers=LAYERS)
    attachment = attached(model, {"epalm": method((1, 2), mask)}, {"adalink": AdaLink(rank=2, modalities=("text",))})
    ids, domain, padding = rows()
    same: dict[str, Any] = {"attention_mask": padding, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    given, none_of_it = token_map(domain, torch.tensor([1, 0, BASE_ROW])), token_map(domain, torch.tensor([1, 1, BASE_ROW]))
    assert needs_whole_sequence(attachment, given) == (mask == "published")
    assert not needs_whole_sequence(attachment, none_of_it)
    with attachment.bind(none_of_it):
        assert torch.equal(model.generate(ids, use_cache=True, **same), model.generate(ids, use_cache=False, **same))
    with attachment.bind(given):
        expected = model.generate(ids, use_cache=False, **same)
        if mask == "causal":
            assert torch.equal(model.generate(ids, use_cache=True, **same), expected)
        else:
            with pytest.raises(AttachError, match="no cache is exact: generate with use_cache=False, or train with mask='causal'"):
                model.generate(ids, use_cache=True, **same)


@pytest.mark.parametrize("layers", [(1, 2), (1, 3)])
def test_an_adapted_model_leaves_the_cache_away_by_itself(layers: tuple[int, int]) -> None:
    adapted = AdaptedModel(tiny("opt", n_layers=LAYERS), inputs=INPUTS)
    excite(adapted.add_adapter("a", {"epalm": method(layers)}).double())
    ids, domain, padding = rows()
    same: dict[str, Any] = {"attention_mask": padding, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    used: list[bool] = []
    stack = adapted.attachment.stack
    stack.register_forward_pre_hook(lambda module, args, kwargs: used.append(kwargs.get("past_key_values") is not None), with_kwargs=True)
    found = adapted.generate(ids, token_map=token_map(domain), **same)
    assert set(used) == {layers == (1, 3)}
    assert torch.equal(found, adapted.generate(ids, token_map=token_map(domain), use_cache=False, **same))


@pytest.mark.parametrize("mask", ["published", "causal"])
def test_a_cache_with_a_sliding_window_is_refused(mask: str) -> None:
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True,
        sliding_window=8, max_window_layers=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).double().eval()
    attachment = attached(model, {"epalm": method(mask=mask)})
    ids, domain, padding = rows()
    same: dict[str, Any] = {"attention_mask": padding, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with attachment.bind(token_map(domain)):
        with pytest.raises(AttachError, match=r"the mask at layers.0 covers 8 of 17 keys.*\(a cache with a sliding window drops some\): generate with use_cache=False"):
            model.generate(ids, **same)
        assert model.generate(ids, use_cache=False, **same).shape == (3, 20)


@pytest.mark.parametrize("mask", ["published", "causal"])
def test_bfloat16_and_checkpointing_give_finite_gradients(mask: str) -> None:
    model = tiny("llama", n_layers=LAYERS).to(torch.bfloat16)
    anatomy = Anatomy.read(model, INPUTS)
    adapter = Adapter({"epalm": method(mask=mask), "prompt": Prompt(length=2, init_std=0.5, form="mlp", positions="none")}, anatomy)
    attachment = attach(model, adapter, anatomy=anatomy)
    attachment.checkpoint_layers()
    ids, domain, padding = rows()
    with attachment.bind(token_map(domain)):
        run(model, ids, padding).float().square().mean().backward()
    gradients = [parameter.grad for parameter in adapter.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_an_adapter_says_whether_its_slots_read_later_tokens() -> None:
    anatomy = Anatomy.read(tiny("opt", n_layers=LAYERS), INPUTS)
    expected = {((1, 3), "published"): True, ((1, 2), "published"): True, ((1, 4), "published"): False, ((1, 3), "causal"): False}
    for (layers, mask), reads in expected.items():
        assert reads_later_tokens(Adapter({"epalm": method(layers, mask)}, anatomy)) == reads
