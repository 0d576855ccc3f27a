"""Every method on every existing vision-language model: cached as uncached, greedy and beams, and trained as it generates."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from existing_models import DECODERS, FAMILIES, IMAGE_ID, answers, batch, excite, existing
from shared import covering

from adalink import IA3, AdaptedModel, BitFit, Ladder, LoRA, Method, Prompt, get_adalink_model
from adalink.errors import AttachError, ConfigError
from adalink.methods.prefix import Prefix
from adalink.methods.unipelt import Gated

TEXT, BOTH = {"text": ("text",)}, {"image": ("image",), "all": ("text", "image")}
METHODS: dict[str, dict[str, Method]] = {
    "scales_and_biases": {"ia3": IA3(groups=BOTH), "bitfit": BitFit(groups=BOTH, force_bias=True)},
    "prefix": {"prefix": Prefix(length=2, form="table", init_std=0.5)},
    "prompt_without_positions": {"soft": Prompt(length=2, init_std=0.5, positions="none")},
    "ladder": {"ladder": Ladder(reduction=2, output="add")},
    "unipelt": {
        "lora": Gated(inner=LoRA(groups=TEXT, rank=2, alpha=4, targets=("query", "value"))),
        "prefix": Gated(inner=Prefix(length=3, form="mlp", init_std=0.5, hidden=8)),
    },
}
NEVER = [2, 60, IMAGE_ID]
SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": NEVER}
NO_PREFIX = {
    "gemma3": "this model normalises its keys after their linear, so a prefix written there would be changed: use Prompt",
    "paligemma2": "this model's attention sees [0-9]+ tokens back, and every token must read a prefix, which is at the start of the row: use Prompt",
}
NO_LADDER = ("qwen2_vl", "qwen2_5_vl")  # so narrow here that the parts of a head that are rotated apart cannot be halved
REFUSED = {*product(NO_PREFIX, ("prefix", "unipelt")), *product(NO_LADDER, ("ladder",))}
CASES = [case for case in product(FAMILIES, METHODS) if case not in REFUSED]


def adapted(family: str, name: str) -> AdaptedModel:
    model = get_adalink_model(existing(family), METHODS[name])
    excite(model.active_adapter().double())
    return model


@pytest.mark.parametrize("family, name", covering(CASES, each=1))
def test_cached_generation_equals_uncached(family: str, name: str) -> None:
    model, inputs = adapted(family, name), batch(family)
    for beams in (1, 3):
        cached, uncached = (model.generate(**inputs, **SETTINGS, num_beams=beams, use_cache=use) for use in (True, False))
        assert torch.equal(cached, uncached)


@pytest.mark.parametrize("family, name", covering((case for case in CASES if case[0] in DECODERS), each=1, shift=2))
def test_training_sees_the_edits_that_generation_saw(family: str, name: str) -> None:
    """Prompts are padded on the left: what a prefix is far from must not depend on the padding."""
    model, inputs = adapted(family, name), batch(family)
    ids = model.generate(**inputs, **SETTINGS)
    n_prompt = inputs["input_ids"].shape[1]
    gradients = answers(family, inputs, n=4)
    gradients["input_ids"], gradients["labels"][:, n_prompt:] = ids, ids[:, n_prompt:]
    output = model(**gradients)
    output.loss.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.active_adapter().parameters())
    logits = output.logits.detach()
    logits[..., NEVER] = -torch.inf
    assert torch.equal(logits[:, n_prompt - 1 : -1].argmax(-1), ids[:, n_prompt:])


def test_a_query_transformer_is_not_taken_for_the_decoder_that_reads_the_encoder() -> None:
    assert AdaptedModel(existing("blip2_opt")).anatomy.reader is None  # BLIP-2's query transformer reads its vision encoder
    assert AdaptedModel(existing("blip2_t5")).anatomy.reader == "language_model.decoder"


@pytest.mark.parametrize("family", NO_PREFIX)
def test_a_prefix_is_refused_where_it_would_be_changed_or_out_of_sight(family: str) -> None:
    with pytest.raises(AttachError, match=NO_PREFIX[family]):
        adapted(family, "prefix")


@pytest.mark.parametrize("family", NO_LADDER)
def test_a_ladder_is_refused_where_a_part_of_a_head_cannot_be_divided(family: str) -> None:
    with pytest.raises(ConfigError, match=r"reduction is 2, which does not divide .* rotated section 0 1, rotated section 1 1, rotated section 2 2 evenly: give 1, or"):
        adapted(family, "ladder")
