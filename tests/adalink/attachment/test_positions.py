"""Slots that take no position: where models keep theirs, and how ids are counted without the slots."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny
from torch import nn

from adalink import ANSWER, BASE_ROW, PAD, PERCEPT, PROMPT, TEXT, AdaptedModel, Adapter, Anatomy, AttachError, Prompt, TokenMap
from adalink.anatomy import Positions
from adalink.attachment.slots import Uncounted, ZeroVector, without_positions

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("family", "positions", "attention"),
    [
        ("opt", Positions("embed_positions", "table"), "causal"),
        ("gpt2", Positions("wpe", "table"), "causal"),
        ("llama", Positions("rotary_emb", "rotary"), "causal"),
        ("qwen2", Positions("rotary_emb", "rotary"), "causal"),
        ("t5", None, "bidirectional"),
    ],
)
def test_where_each_family_makes_positions_and_what_its_tokens_read(family: str, positions: Positions | None, attention: str) -> None:
    anatomy = Anatomy.read(tiny(family))
    assert (anatomy.positions, anatomy.attention) == (positions, attention)


def test_other_families() -> None:
    bert = Anatomy.read(hf.BertModel(hf.BertConfig(**SIZES)))
    assert (bert.positions, bert.attention) == (Positions("embeddings.position_embeddings", "table"), "bidirectional")
    roberta = Anatomy.read(hf.RobertaModel(hf.RobertaConfig(**SIZES)))  # counts from the ids, where padding is row 1
    assert roberta.positions == Positions("embeddings.position_embeddings", "table", 1)
    gemma = hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8))
    assert Anatomy.read(gemma).positions == Positions("rotary_emb", "rotary")
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    assert Anatomy.read(bloom).positions is None


@pytest.mark.parametrize(
    "model",
    [
        lambda: hf.XGLMForCausalLM(hf.XGLMConfig(vocab_size=64, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4)),  # sinusoids
    ],
)
def test_a_model_that_counts_elsewhere_is_refused(model: Any) -> None:
    anatomy = Anatomy.read(model())
    with pytest.raises(AttachError, match="this model takes position ids, and neither a table nor a rotary module for them was found beside its layers"):
        Adapter({"prompt": Prompt(length=2, init_std=0.1, positions="none")}, anatomy)
    Adapter({"prompt": Prompt(length=2, init_std=0.1)}, anatomy)  # the control


@pytest.mark.parametrize("positions", ["none", "counted"])
def test_a_model_that_counts_by_the_shape_of_its_input_is_refused_when_it_runs(positions: Any) -> None:
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}
    model = AdaptedModel(hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=64, d_model=32, **sizes)))
    model.add_adapter("a", {"prompt": Prompt(length=2, init_std=0.1, positions=positions)})
    domain = torch.tensor([[PROMPT, PROMPT, TEXT, TEXT]])
    token_map = TokenMap(domain, torch.zeros(1, dtype=torch.int64))
    ids = torch.tensor([[0, 0, 5, 6]])
    refused = pytest.raises(AttachError, match=r"embed_positions was given no position ids and counts tokens itself, expected ids that slots can be left out of")
    with refused if positions == "none" else contextlib.nullcontext():  # the control: slots that are counted
        model(ids, token_map=token_map, decoder_input_ids=ids)


def test_ids_do_not_count_slots_of_served_rows() -> None:
    domain = torch.tensor([[PERCEPT, PROMPT, TEXT, TEXT, PAD], [PAD, PERCEPT, TEXT, PERCEPT, TEXT], [PERCEPT, TEXT, TEXT, TEXT, TEXT]])
    tokens = TokenMap(domain, torch.tensor([0, 0, BASE_ROW])).window(3, 0, 5, 5)
    given_ids = torch.tensor([[0, 1, 2, 3, 0], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4]])
    assert Uncounted()(given_ids, tokens, (PERCEPT,), 0).tolist() == [[0, 0, 1, 2, 0], [0, 0, 0, 0, 1], [0, 1, 2, 3, 4]]
    assert Uncounted()(torch.arange(5)[None], tokens, (PERCEPT, PROMPT), 0)[0].tolist() == [0, 0, 0, 1, 4]  # one row of ids for all
    three = Uncounted()(given_ids.expand(3, 3, 5), tokens, (PERCEPT,), 0)  # three axes, as in Qwen2-VL
    assert torch.equal(three, Uncounted()(given_ids, tokens, (PERCEPT,), 0).expand(3, 3, 5))


def test_text_that_holds_the_padding_id_keeps_the_padding_row() -> None:
    """RoBERTa counts from the ids: what holds the padding id is at row 1, a slot as well as padding that is edited as text."""
    tokens = TokenMap(torch.tensor([[PERCEPT, PERCEPT, TEXT, TEXT, TEXT]]), torch.tensor([0])).window(1, 0, 5, 5)
    assert Uncounted(padding_row=1)(torch.tensor([[2, 1, 3, 4, 1]]), tokens, (PERCEPT,), 0).tolist() == [[0, 1, 2, 3, 1]]
    assert Uncounted()(torch.tensor([[2, 1, 3, 4, 1]]), tokens, (PERCEPT,), 0).tolist() == [[0, 0, 1, 2, 0]]  # the control


@given(st.lists(st.sampled_from([TEXT, ANSWER, PERCEPT, PROMPT]), min_size=1, max_size=8), st.integers(0, 4), st.integers(1, 3))
def test_a_later_call_counts_on(domains: list[int], start: int, length: int) -> None:
    token_map = TokenMap(torch.tensor([domains]), torch.tensor([0]))
    end = start + length
    edit, slots = Uncounted(), (PERCEPT, PROMPT)
    whole = edit(torch.arange(end)[None], token_map.window(1, 0, end, end), slots, 0)
    part = edit(torch.arange(start, end)[None], token_map.window(1, start, length, end), slots, 0)
    assert torch.equal(part, whole[:, start:])


def test_a_slot_without_a_position_has_no_vector() -> None:
    h = torch.full((1, 2, 3), float("nan"))
    assert torch.equal(ZeroVector()(h, None, h), torch.zeros(1, 2, 3))  # type: ignore[arg-type]
    assert not without_positions(Anatomy.read(tiny("t5")), (PERCEPT,))
    assert all(isinstance(placement.edit, nn.Module) for placement in without_positions(Anatomy.read(tiny("opt")), (PERCEPT,)))
