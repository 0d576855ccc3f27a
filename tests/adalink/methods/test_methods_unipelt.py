"""Gate, bottleneck and UniPELT: counts, causality, frozen gates, encoder-only hosts, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import EXACT, VOCABULARY, WIDTH, excite, positions, rows, tiny, token_map
from torch import Tensor

from adalink import (
    ANSWER,
    TEXT,
    AdaLink,
    Adapter,
    Anatomy,
    AttachError,
    Bottleneck,
    ConfigError,
    Gated,
    LoRA,
    Method,
    Port,
    Prefix,
    Prompt,
    TokenMap,
    UniPELT,
    attach,  # fmt: skip
    get_adalink_model,
)  # fmt: skip
from adalink.attachment.recompute import reads_later_tokens
from adalink.attachment.slots import ZeroVector
from adalink.edit import Placement

SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
HOSTS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**SIZES)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**SIZES)),
    "bert_words": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
}
ON_ENCODERS: dict[str, Method] = {
    "adalink": AdaLink(rank=4, modalities=("text",)),
    "lora": LoRA(groups={"text": ("text",)}, rank=2, alpha=2, targets=("query", "value")),
    "prompt": Prompt(length=2, init_std=0.5),
    "prefix": Prefix(length=2, form="mlp", init_std=0.5, hidden=6),
    "gated": Gated(inner=Bottleneck(width=4)),
    "apl": UniPELT(variant="APL", bottleneck=4, prefix_length=2, prefix_hidden=6, lora_rank=2, mean="sequence"),
}
APL = UniPELT(variant="APL", bottleneck=4, prefix_length=2, prefix_hidden=6, lora_rank=2)


def attached(model: Any, method: Any) -> Any:
    adapter = Adapter({"unipelt": method}, Anatomy.read(model)).double()
    excite(adapter)
    return attach(model, adapter)


@pytest.mark.parametrize(("variant", "total"), [("AP", 1_097_304), ("APL", 1_410_672)])
def test_bert_base_trains_as_many_parameters_as_published(variant: Any, total: int) -> None:
    """UniPELT's totals at inference, where the prefix's network has become a table."""
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig())
        adapter = Adapter({"unipelt": UniPELT(variant=variant, prefix_form="table")}, Anatomy.read(model))
    assert sum(adapter.n_parameters().values()) == total


def test_adapters_are_where_layers_end_before_a_closing_norm_or_after_the_sum() -> None:
    method = Bottleneck(width=2)
    post = hf.OPTForCausalLM(hf.OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, do_layer_norm_before=False))
    assert [p.port for p in method.place(Anatomy.read(post))] == [Port("layers.0.final_layer_norm", "foreseen")]
    assert method.place(Anatomy.read(HOSTS["bert"]()))[0].port == Port("encoder.layer.0.output.LayerNorm", "foreseen")
    assert [p.port for p in method.place(Anatomy.read(tiny("opt")))] == [Port("layers.0", "returned"), Port("layers.1", "returned")]


def test_an_excluded_layer_has_no_adapter() -> None:
    (placed,) = Bottleneck(width=2, exclude_layers=(0,)).place(Anatomy.read(tiny("opt")))
    assert (placed.role, placed.port) == ("1", Port("layers.1", "returned"))


def whole_and_stepped(family: str, method: Any) -> tuple[Tensor, Tensor]:
    model = tiny(family)
    ids, domain, mask = rows()
    n = ids.shape[1] - 2
    attachment = attached(model, method)
    with torch.no_grad(), attachment.bind(token_map(domain)):
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits[:, -2:]
    with torch.no_grad(), attachment.bind(token_map(domain[:, :n])):
        output = model(input_ids=ids[:, :n], attention_mask=mask[:, :n], position_ids=positions(mask)[:, :n], use_cache=True)
        stepped = model(input_ids=ids[:, n:], attention_mask=mask, position_ids=positions(mask)[:, n:], past_key_values=output.past_key_values).logits
    return whole, stepped


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_prompts_gate_is_frozen_at_prefill_and_the_published_one_is_not(family: str) -> None:
    whole, stepped = whole_and_stepped(family, APL)
    torch.testing.assert_close(stepped, whole, rtol=0, atol=EXACT[family])
    published = UniPELT(variant="APL", bottleneck=4, prefix_length=2, prefix_hidden=6, lora_rank=2, mean="sequence")
    whole, stepped = whole_and_stepped(family, published)
    assert (whole - stepped).abs().max() > 1e-4


@pytest.mark.parametrize(("mean", "leaks"), [("prompt", False), ("sequence", True)])
def test_only_the_published_gate_lets_an_answer_reach_what_is_before_it(mean: Any, leaks: bool) -> None:
    model = tiny("gpt2")
    ids, domain, mask = rows()
    attachment = attached(model, Gated(inner=Bottleneck(width=4), mean=mean))
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    assert (domain[:, -1] == ANSWER).all()
    with torch.no_grad(), attachment.bind(token_map(domain)):
        a, b = (model(input_ids=one, attention_mask=mask).logits[:, :-1] for one in (ids, changed))
    assert torch.equal(a, b) is not leaks


def test_two_generations_at_once_keep_their_own_gates() -> None:
    model = tiny("llama")
    attachment = attached(model, Gated(inner=Bottleneck(width=4)))
    first, second = (torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    bound = TokenMap(torch.full((2, 5), TEXT), torch.zeros(2, dtype=torch.int64))
    with torch.no_grad(), attachment.bind(bound):
        whole = [model(input_ids=ids).logits[:, -1] for ids in (first, second)]
        caches = [model(input_ids=ids[:, :5], use_cache=True).past_key_values for ids in (first, second)]
        stepped = [model(input_ids=ids[:, 5:], past_key_values=cache).logits[:, -1] for ids, cache in zip((first, second), caches, strict=True)]
    for a, b in zip(whole, stepped, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "alone"), [(APL, True), (Gated(inner=Bottleneck(width=4)), True), (Bottleneck(width=4), False), (ON_ENCODERS["prefix"], False)])
def test_a_gate_needs_a_row_for_each_text(method: Any, alone: bool) -> None:
    assert reads_later_tokens(Adapter({"method": method}, Anatomy.read(tiny("gpt2")))) is alone


def test_a_prompt_in_parts_has_no_gate() -> None:
    model = tiny("llama")
    attachment = attached(model, Gated(inner=Bottleneck(width=4)))
    ids = torch.randint(3, VOCABULARY, (2, 6))
    with attachment.bind(TokenMap(torch.full((2, 6), TEXT), torch.zeros(2, dtype=torch.int64))), pytest.raises(AttachError, match="or a part of a prompt"):
        model(input_ids=ids[:, :3])


def test_a_prompt_is_continued_with_rows_that_are_a_multiple_of_its_own() -> None:
    model = tiny("llama")
    attachment = attached(model, Gated(inner=Bottleneck(width=4)))
    ids = torch.randint(3, VOCABULARY, (2, 5))
    with torch.no_grad(), attachment.bind(TokenMap(torch.full((2, 4), TEXT), torch.zeros(2, dtype=torch.int64))):
        expected = model(input_ids=ids).logits[:, -1]
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        cache.batch_repeat_interleave(3)
        beams = model(input_ids=ids[:, 4:].repeat_interleave(3, 0), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(beams, expected.repeat_interleave(3, 0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ON_ENCODERS)
@pytest.mark.parametrize("host", HOSTS)
def test_encoder_only_models_are_adapted_and_trained_in_one_line(host: str, name: str) -> None:
    torch.manual_seed(0)
    base = HOSTS[host]().double()
    ids = torch.randint(3, VOCABULARY, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    model = get_adalink_model(base, ON_ENCODERS[name])
    excite(model.active_adapter().double())
    with model.disable_adapter(), torch.no_grad():
        alone = result(model(ids, attention_mask=mask))
    adapted = result(model(ids, attention_mask=mask))
    assert adapted.shape == alone.shape
    assert not torch.allclose(adapted[mask.bool()], alone[mask.bool()], atol=1e-3)
    adapted[mask.bool()].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.active_adapter().parameters())
    assert all(p.grad is None for p in base.parameters())
    single = result(model(ids[1:, :4], attention_mask=mask[1:, :4]))
    if name != "apl":  # the published gate reads the padding too
        torch.testing.assert_close(adapted[1:, :4], single, rtol=0, atol=1e-10)


def result(output: Any) -> Tensor:
    value: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return value


def test_what_a_model_pools_from_its_first_token_is_never_a_slots() -> None:
    ids = torch.randint(3, VOCABULARY, (2, 6))
    base = HOSTS["bert"]()
    output = get_adalink_model(base, ON_ENCODERS["prefix"])(ids)
    assert torch.equal(output.pooler_output, base.pooler(output.last_hidden_state))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bottleneck(width=0), "the bottleneck's width is 0: give 1 or more"),
        (lambda: Bottleneck(width=1, domains=(99,)), r"the bottleneck's domains are \[99\]: give one or more of 0 to 15"),
        (lambda: Gated(inner="lora"), "Gated wraps a method, got 'lora'"),  # type: ignore[arg-type]
        (lambda: Gated(inner=Gated(inner=Bottleneck(width=1))), "already gated: gate it once"),
        (lambda: Gated(inner=Bottleneck(width=1), mean="median"), "the gate's mean is over 'median': give prompt or sequence"),  # type: ignore[arg-type]
        (lambda: UniPELT(variant="P"), "UniPELT's variant is 'P': give AP"),  # type: ignore[arg-type]
        (lambda: UniPELT(variant="AP", bottleneck=0), "the bottleneck's width is 0"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_method_without_edits_of_hidden_states_cannot_be_gated() -> None:



    @dataclasses.dataclass(frozen=True)
    class Unmoved:
        def slots(self, anatomy: Anatomy) -> tuple[()]:
            return ()

        def place(self, anatomy: Anatomy) -> list[Placement]:
            return [Placement("none", Port("wpe", "position"), ZeroVector(), (TEXT,))]

    with pytest.raises(AttachError, match="Unmoved edits no hidden state of this model, so there is nothing to gate"):
        Gated(inner=Unmoved()).place(Anatomy.read(tiny("gpt2")))
