"""Which way texts share their image is chosen by the program: by the family, its attention, and what the adapter reads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from sharing import N_PATCHES, TEXTS, adapted, batch_of, check_equal, gradients, in_double, rows, slots_of
from tiny import tiny
from tiny_families import tiny_of
from transformers import BertConfig, BertModel, PaliGemmaConfig, PaliGemmaForConditionalGeneration

from adalink import ANSWER, EPALM, IMAGE, PREFIX, TEXT, AdaLink, Bottleneck, Bridge, Gated, LoRA, Method, Prefix, UniPELT
from adalink.errors import ConfigError
from multimodal.batches.collate import collate
from multimodal.batches.packing import arrangement, fork_rows, pack_answers, pack_rows, separate_rows
from multimodal.batches.prefix_sharing import After, forks_exactly, may_fork, may_pack
from multimodal.batches.tokenize import Row
from multimodal.loss.language_loss import LanguageLoss

LORA = LoRA(groups={"text": ("text",)}, rank=2, alpha=2.0)


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon_alibi", "gpt_neo_local", "olmo"])
def test_families_that_take_no_packed_row_are_forked(name: str) -> None:
    arrange, note = arrangement(adapted(name, {"lora": LORA}).base)
    assert arrange is fork_rows
    assert note.startswith("one row per text, after what the texts of an image share, which is read once")


def test_bloom_and_mpt_would_be_wrong_in_one_row() -> None:
    """The control of the list: MPT takes the mask and is wrong, Bloom takes the positions of a row."""
    for name in ("mpt", "bloom", "falcon_alibi"):
        model = adapted(name)
        try:
            packed = gradients(model, batch_of(pack_rows, slots_of(model)))[0]
        except (RuntimeError, ValueError, IndexError):
            continue
        assert (packed - gradients(model, batch_of(separate_rows, slots_of(model)))[0]).abs() > 1e-3


def test_attention_that_takes_no_mask_of_ours_is_forked() -> None:
    model = tiny_of("llama", "sdpa")
    model.config._attn_implementation = "flash_attention_2"
    assert arrangement(model)[0] is fork_rows
    eager_only = tiny_of("gptj", "eager")
    eager_only.config._attn_implementation = "sdpa"
    assert not may_pack(eager_only)


def test_what_is_not_causal_is_left_apart() -> None:
    bert = BertModel(BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 16}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 28, "patch_size": 14}
    pali = PaliGemmaForConditionalGeneration(PaliGemmaConfig(text_config={**text, "model_type": "gemma"}, vision_config={**vision, "model_type": "siglip_vision_model"}))
    looking_ahead = tiny_of("gemma3")
    looking_ahead.config.use_bidirectional_attention = True
    for model in (tiny("t5"), bert, pali, looking_ahead, tiny_of("mamba", "eager")):
        arrange, note = arrangement(model)
        assert arrange is separate_rows
        assert note == f"one row per text: {model.config.model_type} can share neither row nor cache"


def test_rotations_that_depend_on_the_length_of_a_row_are_not_forked() -> None:
    model: Any = tiny_of("olmo")
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    assert not may_fork(model)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mpt", "bloom", "olmo", "cohere", "gpt_neo_local"])
def test_a_trial_finds_that_a_model_forks_exactly(name: str) -> None:
    assert forks_exactly(adapted(name))


def test_a_trial_finds_what_reads_otherwise_after_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that are lost on the way, and a cache that the model does not know."""
    model = adapted("llama")
    right = After.update
    monkeypatch.setattr(After, "update", lambda self, keys, values, *rest: tuple(0 * one for one in right(self, keys, values)))
    assert not forks_exactly(model)
    assert not forks_exactly(adapted("mamba", {"adalink": AdaLink(rank=2, modalities=("text",))}))


def test_rows_of_mamba_are_right_apart() -> None:
    """Each row's loss is what it is alone, with its neighbours' padding behind it."""
    model = adapted("mamba", {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=2, modalities=("text",))})
    arrange, _ = arrangement(model.base, model.active_adapter())
    together = gradients(model, batch_of(arrange))
    whole = batch_of(arrange)
    alone = []
    for i in range(len(whole.ids)):
        n = int(whole.attention_mask[i].sum())
        kinds = ("ids", "domain", "position")
        one = {**vars(whole), **{name: getattr(whole, name)[i : i + 1, :n] for name in kinds}, "source": whole.source[i : i + 1], "target": whole.target[i : i + 1]}
        alone.append(gradients(model, type(whole)(**{**one, "image": whole.image[i : i + 1]})))
    check_equal([torch.stack(parts).sum(0) for parts in zip(*alone, strict=True)], together)


GATED: dict[str, dict[str, Method]] = {
    "gated bottleneck": {"bridge": Bridge(kind="linear"), "gated": Gated(inner=Bottleneck(width=4))},
    "gated LoRA": {"bridge": Bridge(kind="linear"), "gated": Gated(inner=LORA)},
    "UniPELT": {"bridge": Bridge(kind="linear"), "unipelt": UniPELT(variant="APL", bottleneck=4, prefix_length=2, prefix_hidden=6, lora_rank=2, prefix_init_std=0.5)},
}


@pytest.mark.parametrize("methods", GATED.values(), ids=GATED)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_gates_over_the_prompt_are_packed_where_texts_share_the_whole_prompt(family: str, methods: dict[str, Method]) -> None:
    model = adapted(family, methods)
    arrange, note = arrangement(model.base, model.active_adapter())
    assert arrange is pack_answers
    assert note == "one row per image whose texts differ in their answers alone: the adapter's gates read the prompt"
    batch, apart = (batch_of(one, slots_of(model)) for one in (arrange, separate_rows))
    assert len(batch.ids) == len(apart.ids)  # the samples of this batch ask different questions
    captions, captions_apart = (batch_of(one, slots_of(model), texts=[(2, [4, 6, 2]), (3, [8, 4])]) for one in (arrange, separate_rows))
    assert len(captions.ids) == 2
    check_equal(gradients(model, captions), gradients(model, captions_apart))
    with pytest.raises(ConfigError, match="several texts with questions of their own in a row, and a gate of the adapter reads the whole prompt"):
        gradients(model, batch_of(pack_rows, slots_of(model)))


def test_gates_over_the_prompt_are_not_forked() -> None:
    model = adapted("mpt", {"gated": Gated(inner=Bottleneck(width=4))})
    arrange, note = arrangement(model.base, model.active_adapter())
    assert arrange is separate_rows
    assert note == "one row per text: a gate of the adapter reads the prompt, and mpt can share no row"


@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_what_reads_later_tokens_is_left_apart(name: str) -> None:
    sequence = adapted(name, {"gated": Gated(inner=Bottleneck(width=4), mean="sequence")})
    assert arrangement(sequence.base, sequence.active_adapter())[0] is separate_rows
    model = adapted("llama", {"epalm": EPALM(layers=(0, 1), n_taps=1, connector="shared", mask="published")})
    arrange, note = arrangement(model.base, model.active_adapter())
    assert arrange is separate_rows
    assert note.startswith("one row per text: a slot of the adapter reads later tokens, or a gate the row")
    with pytest.raises(ConfigError, match="collate one row for each text, or train with mask='causal'"):
        gradients(model, batch_of(pack_rows, slots_of(model)))


def test_prefixes_are_shared_in_every_way() -> None:
    for family in ("opt", "llama", "gpt2"):
        model = adapted(family, {"bridge": Bridge(kind="linear"), "prefix": Prefix(length=2, form="mlp", init_std=0.5, hidden=6)})
        assert slots_of(model) == [PREFIX, PREFIX]
        wanted = gradients(model, batch_of(separate_rows, slots_of(model)))
        for arrange in (pack_rows, fork_rows):
            check_equal(gradients(model, batch_of(arrange, slots_of(model))), wanted)


def test_a_batch_of_single_texts_is_one_call() -> None:
    model = adapted("mpt")
    batch = batch_of(fork_rows, slots_of(model), texts=[(2, [4]), (3, [5])])
    assert batch.shared_prefix is not None
    calls: list[int] = []
    handle = model.base.register_forward_pre_hook(lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    loss = LanguageLoss(model)
    assert batch.patches is not None
    gradients(model, batch, loss)  # the first call tries the model out
    calls.clear()
    gradients(model, batch, loss)
    handle.remove()
    assert calls == [2]


def test_beginnings_are_as_long_as_the_shortest_of_a_batch() -> None:
    batch = batch_of(fork_rows)
    shared = [sum(row.domain[i] == IMAGE for i in range(len(row.ids))) for row in rows((), 2, [4], 0)]
    assert shared == [N_PATCHES]
    assert batch.shared_prefix is not None
    assert batch.shared_prefix.length == N_PATCHES + 2  # the first image's prompt has two tokens, and its texts share no more
    assert batch.shared_prefix.first.tolist() == [0, 3, 4]
    assert batch.shared_prefix.which.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.shared_prefix.domains == {IMAGE, TEXT}
    assert len(TEXTS) == 3


def test_models_whose_weights_are_split_over_processes_are_called_once_a_step() -> None:
    """A process with single texts would call the model once, another twice, and each wait for the other's weights."""
    prompt = Row((0, 0, 0, 7), (IMAGE, IMAGE, IMAGE, TEXT))
    for name, wanted in (("llama", pack_rows), ("mpt", separate_rows)):
        model = adapted(name, {"lora": LORA})
        arrange, note = arrangement(model.base, model.active_adapter(), prompt, "split")
        assert arrange is wanted
    assert note == "one row per text: the model's weights are split over processes, and mpt can share no row"


def test_rows_that_share_nothing_have_no_beginning() -> None:
    texts = [Row((7, 8), (TEXT, ANSWER), (1,), (9,)), Row((8, 8), (TEXT, ANSWER), (1,), (9,))]
    batch = collate(fork_rows(texts), [0, 0], torch.zeros(1, 1, 1), kind="patches", side="right", pad_id=0)
    assert batch.shared_prefix is None
    assert [row.shared_prefix for row in partial(fork_rows, trained=frozenset({TEXT}))(texts[:1])] == [0]
