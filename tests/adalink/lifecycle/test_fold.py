"""Adapters made part of the weights: equal logits from a plain model that was saved and loaded again, and a reason where it is not exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EXACT, VOCABULARY, excite, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from adalink import AdaLink, AdaLoRA, AdaptedModel, BitFit, HiRA, LoRA, Method, Prompt, SparseDelta
from adalink.errors import AttachError, ConfigError
from adalink.lifecycle.export import check_foldable, check_mergeable, fold_embedding, is_tied, merge_linears, untie

TEXT = AdaLink(rank=3, modalities=("text",), activation="gelu", bias=True)
IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(4))


def adapted(family: str, method: Method) -> tuple[AdaptedModel, Tensor]:
    """A frozen model with an excited adapter, and its logits."""
    model = AdaptedModel(tiny(family))
    excite(model.add_adapter("one", {"method": method}).double())  # in float32 the edit's own rounding would show
    with torch.no_grad():
        return model, logits(model, family)


@torch.no_grad()
def logits(model: nn.Module, family: str) -> Tensor:
    more: dict[str, Any] = {"decoder_input_ids": torch.tensor([[0, 5, 6]]).expand(2, -1)} if family == "t5" else {}
    return model(input_ids=IDS, **more).logits


def reloaded(model: Any, folder: Path, family: str = "") -> nn.Module:
    model.save_pretrained(folder)
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_folded_table_gives_the_adapters_logits(family: str, tmp_path: Path) -> None:
    model, expected = adapted(family, TEXT)
    adapter, base = model.active_adapter(), model.unload()
    raw = logits(base, family)
    assert not is_tied(base)
    fold_embedding(base, adapter)
    folded = logits(reloaded(base, tmp_path), family)
    assert torch.allclose(folded, expected, atol=EXACT[family], rtol=0)
    assert not torch.allclose(raw, expected, atol=1e-3)  # the control: the adapter does something


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_tied_head_is_refused_until_it_has_a_table_of_its_own(family: str, tmp_path: Path) -> None:
    model, expected = adapted(family, TEXT)
    adapter, base = model.active_adapter(), model.unload()
    assert is_tied(base)
    raw = logits(base, family)
    with pytest.raises(ConfigError, match="this model's output head is its embedding table, so folding an adapter into one changes the other: untie them first"):
        fold_embedding(base, adapter)
    assert torch.equal(logits(base, family), raw)
    untie(base)
    assert torch.equal(logits(base, family), raw)
    fold_embedding(base, adapter)
    assert torch.allclose(logits(reloaded(base, tmp_path), family), expected, atol=EXACT[family], rtol=0)


def test_a_table_is_folded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = adapted("llama", TEXT)
    adapter, base = model.active_adapter(), model.unload()
    monkeypatch.setattr("adalink.lifecycle.export.ROWS_AT_ONCE", 5)
    fold_embedding(base, adapter)
    assert torch.allclose(logits(base, "llama"), expected, atol=EXACT["llama"], rtol=0)


NO_TABLE: list[tuple[dict[str, Method], str]] = [
    ({"a": TEXT, "b": Prompt(length=2, init_std=1.0)}, "an adapter that is one AdaLink alone can be folded, and this one has AdaLink, Prompt"),
    ({"a": BitFit(groups={"all": ("all",)})}, "and this one has BitFit"),
    ({"a": AdaLink(rank=2, modalities=("text",), scope="prompt")}, "this one has the modalities text and scope 'prompt'"),
    ({"a": AdaLink(rank=2, modalities=("text", "image"))}, "this one has the modalities text, image and scope 'all'"),
]


@pytest.mark.parametrize(("methods", "expected"), NO_TABLE, ids=[expected[-30:] for _, expected in NO_TABLE])
def test_what_is_no_table_is_refused(methods: dict[str, Method], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_foldable(methods)


def test_an_encoder_decoder_model_and_one_with_pictures_are_not_folded() -> None:
    model, _ = adapted("t5", TEXT)
    with pytest.raises(ConfigError, match="this is an encoder-decoder model, whose adapters edit the encoder's inputs alone"):
        fold_embedding(model.base, model.active_adapter())
    model, _ = adapted("llama", TEXT)
    model.base.config.image_token_id = 5  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="this model also reads images"):
        fold_embedding(model.base, model.active_adapter())


def test_an_embedding_that_is_more_than_a_table_is_refused() -> None:
    model, _ = adapted("llama", TEXT)
    model.base.get_input_embeddings().max_norm = 1.0  # type: ignore[operator]
    with pytest.raises(AttachError, match="the word embedding is a Embedding that does more than to look up rows"):
        fold_embedding(model.base, model.active_adapter())


EVERYWHERE = LoRA(groups={"all": ("all",)}, rank=2, alpha=3.0, bias="auto")


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2", "t5"])
@pytest.mark.parametrize("targets", [("all",), ("query", "value")])
def test_a_merged_lora_gives_the_adapters_logits(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    """gpt2: a part of one transposed linear that makes queries, keys and values."""
    lora = LoRA(groups={"all": ("all",), "words": ("text",)}, rank=2, alpha=3.0, bias="auto", targets=targets)
    model, expected = adapted(family, lora)
    adapter, base = model.active_adapter(), model.unload()
    raw = logits(base, family)
    merge_linears(base, adapter)
    assert torch.allclose(logits(reloaded(base, tmp_path, family), family), expected, atol=10 * EXACT[family], rtol=0)
    assert not torch.allclose(raw, expected, atol=1e-3)


PARTS = ("query", "down")
MERGED = (HiRA(rank=2, targets=PARTS), AdaLoRA(init_rank=3, target_rank=2, targets=PARTS), SparseDelta(fraction=0.5, targets=PARTS))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", MERGED, ids=[type(method).__name__ for method in MERGED])
def test_a_merged_change_of_another_form_gives_the_adapters_logits(family: str, method: Method, tmp_path: Path) -> None:
    model, expected = adapted(family, method)
    adapter, base = model.active_adapter(), model.unload()
    raw = logits(base, family)
    merge_linears(base, adapter)
    assert torch.allclose(logits(reloaded(base, tmp_path, family), family), expected, atol=10 * EXACT[family], rtol=0)
    assert not torch.allclose(raw, expected, atol=1e-3)


NO_MERGE: list[tuple[LoRA, str]] = [
    (LoRA(groups={"answers": ("answer",)}, rank=2, alpha=1.0), r"method.answers.0.q_proj edits some of them: only a LoRA with one group for all domains"),
    (LoRA(groups={"all": ("all",)}, rank=2, alpha=1.0, bias="all"), "method.all.0.q_proj has a bias and layers.0.self_attn.q_proj has none"),
]


@pytest.mark.parametrize(("lora", "expected"), NO_MERGE, ids=["group", "bias"])
def test_a_lora_that_is_not_the_same_for_every_token_is_not_merged(lora: LoRA, expected: str) -> None:
    model, _ = adapted("llama", lora)
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    with pytest.raises(ConfigError, match=expected):
        merge_linears(model.base, model.active_adapter())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.base.state_dict().items())


def test_text_alone_is_not_every_token_of_a_model_with_pictures() -> None:
    model, _ = adapted("llama", LoRA(groups={"words": ("text",)}, rank=2, alpha=1.0))
    model.base.config.image_token_id = 5  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="edits some of them"):
        merge_linears(model.base, model.active_adapter())


def test_only_a_lora_alone_and_only_plain_linears_are_merged() -> None:
    with pytest.raises(ConfigError, match="an adapter that is one LoRA alone can be merged, and this one has LoRA, AdaLink: keep it beside the model"):
        check_mergeable({"a": EVERYWHERE, "b": TEXT})
    with pytest.raises(ConfigError, match="HiRA with one group can be merged, and this one has all, words: keep it beside the model"):
        check_mergeable({"h": HiRA(rank=1, groups={"all": ("all",), "words": ("text",)})})
    model, _ = adapted("llama", EVERYWHERE)
    adapter, base = model.active_adapter(), model.unload()

    class Quantized(nn.Linear):
        """Stands for a linear whose weight is no matrix."""

    base.model.layers[0].mlp.down_proj = Quantized(48, 32, bias=False)  # type: ignore[union-attr,index]
    with pytest.raises(AttachError, match=r"mlp.down_proj is a Quantized, expected a linear with a plain weight matrix"):
        merge_linears(base, adapter)
