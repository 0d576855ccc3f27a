"""The prefix equals the published concatenation, on every family; cached, with beams; and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
import transformers as hf
from double import InDouble
from tiny import EXACT, VOCABULARY, WIDTH, excite, tiny
from torch import Tensor, nn
from transformers import DynamicCache

from adalink import PAD, PREFIX, TEXT, Adapter, Anatomy, AttachError, ConfigError, Port, Prefix, TokenMap, attach
from adalink.attachment.slots import NoDistance
from adalink.methods.prefix import Direct, Reparametrised

P = 3
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "pad_token_id": 1}
ENCODERS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**SIZES, attn_implementation="eager"), add_pooling_layer=False),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**SIZES, attn_implementation="eager"), add_pooling_layer=False),
    "t5": lambda: tiny("t5"),
}
MODELS: dict[str, Callable[[], Any]] = {**ENCODERS, **{family: partial(tiny, family) for family in ("llama", "opt", "gpt2")}}


def prefixed(model: Any, form: Any = "mlp", exclude: tuple[int, ...] = ()) -> Adapter:
    method = Prefix(length=P, form=form, init_std=0.5, hidden=6, exclude_layers=exclude)
    adapter = Adapter({"prefix": method}, Anatomy.read(model)).double()
    excite(adapter)
    return adapter


def batch() -> tuple[Tensor, Tensor]:
    """ids and mask, left-padded raggedly."""
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(7) >= torch.tensor([[0], [2], [1]])).long()
    return ids.masked_fill(mask == 0, 1), mask


def with_slots(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, TokenMap]:
    domain = torch.where(mask == 0, PAD, TEXT)
    domain = torch.cat([torch.full((len(ids), P), PREFIX), domain], 1)
    pad = nn.functional.pad
    return pad(ids, (P, 0), value=1), pad(mask, (P, 0), value=1), TokenMap(domain, torch.zeros(len(ids), dtype=torch.int64))


def rows_of(adapter: Adapter, anatomy: Anatomy, exclude: tuple[int, ...] = ()) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values [P, D_kv] of each layer that is not excluded, in chunks: 2i keys, 2i + 1 values of the i-th of them."""
    table = adapter.get_submodule("prefix.shared")
    assert isinstance(table, Direct | Reparametrised)
    left = [layer for layer in range(len(anatomy.layers)) if layer not in exclude]
    pieces = table.pieces()
    return {layer: (table(pieces[2 * i]), table(pieces[2 * i + 1])) for i, layer in enumerate(left)}


@pytest.mark.parametrize("form", ["mlp", "table"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
def test_a_decoder_with_slots_equals_one_whose_cache_begins_with_the_prefix(family: str, form: str) -> None:
    model = tiny(family)
    adapter, anatomy = prefixed(model, form), Anatomy.read(model)
    ids, mask = batch()
    position = (mask.cumsum(1) - 1).clamp(min=0)
    heads = model.config.num_attention_heads
    cache = DynamicCache(config=model.config)
    for i, (key, value) in rows_of(adapter, anatomy).items():
        width = model.config.hidden_size // heads
        split = [one.view(P, -1, width).transpose(0, 1).expand(3, -1, -1, -1).detach() for one in (key, value)]
        cache.update(split[0], split[1], i)
    seen = torch.cat([torch.ones(3, P, dtype=torch.int64), mask], 1)
    with torch.no_grad():
        reference = model(input_ids=ids, attention_mask=seen, position_ids=position, past_key_values=cache).logits
    attachment = attach(model, adapter)
    long_ids, long_mask, token_map = with_slots(ids, mask)
    with torch.no_grad(), attachment.bind(token_map):
        counted = (long_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=long_ids, attention_mask=long_mask, position_ids=counted).logits[:, P:]
    real = mask.bool()
    torch.testing.assert_close(logits[real], reference[real], rtol=0, atol=EXACT[family])
    assert not torch.allclose(logits[real], model_alone(model, attachment, ids, mask, position)[real], atol=1e-3)  # control: a prefix does something


def model_alone(model: Any, attachment: Any, ids: Tensor, mask: Tensor, position: Tensor) -> Tensor:
    attachment.detach()
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=position).logits
    return logits


@pytest.mark.parametrize(("family", "exclude"), [*((family, ()) for family in ENCODERS), *((family, (layer,)) for family in MODELS for layer in (0, 1))])
def test_slots_equal_the_published_concatenation_in_the_layers_that_are_not_excluded(
    family: str, exclude: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with InDouble():  # eager attention casts its softmax to float32, whose rounding is the processor's
        off = off_the_concatenation(family, exclude, monkeypatch)
    assert off < 1e-10


def off_the_concatenation(family: str, exclude: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> float:
    """The largest difference between a call with slots and the published concatenation, over all tokens that are no padding."""
    torch.manual_seed(0)
    model: Any = MODELS[family]().double().eval()
    model.set_attn_implementation("eager")
    adapter, anatomy = prefixed(model, exclude=exclude), Anatomy.read(model)
    ids, mask = batch()
    ids, mask = ids.flip(1), mask.flip(1)  # padded on the right, as encoders are
    decoder = {"decoder_input_ids": torch.tensor([[0, 5, 6]]).expand(3, -1)} if family == "t5" else {}
    reference = concatenated(copy.deepcopy(model), rows_of(adapter, anatomy, exclude), monkeypatch, {"input_ids": ids, "attention_mask": mask, **decoder})
    attachment = attach(model, adapter)
    long_ids, long_mask, token_map = with_slots(ids, mask)
    with torch.no_grad(), attachment.bind(token_map):
        output = model(input_ids=long_ids, attention_mask=long_mask, **decoder)
    given = output.logits if hasattr(output, "logits") else output.last_hidden_state
    difference = given - reference if family == "t5" else (given[:, P:] - reference)[mask.bool()]
    return difference.abs().max().item()


def concatenated(model: Any, rows: dict[int, tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Tensor]) -> Tensor:
    """The frozen model's output where the self-attention of each layer in `rows` reads [P_K ; K] and [P_V ; V], with mask and bias 0."""
    module = __import__(type(model).__module__, fromlist=["x"])
    plain = module.eager_attention_forward
    anatomy = Anatomy.read(model)
    stack = model.get_submodule(anatomy.stack)
    layer_of = {stack.get_submodule(one.key.linear.rpartition(".")[0]): i for i, one in enumerate(anatomy.projections)}

    def eager(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Any:
        if layer_of.get(attention) in rows:
            more = [one.view(P, key.shape[1], -1).transpose(0, 1).expand(len(key), -1, -1, -1) for one in rows[layer_of[attention]]]
            key, value = torch.cat([more[0], key], 2), torch.cat([more[1], value], 2)
            mask = nn.functional.pad(mask, (P, 0))
            if kwargs.get("position_bias") is not None:
                kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (P, 0))
        return plain(attention, query, key, value, mask, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "eager_attention_forward", eager)
        output = model(**inputs)
    result: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return result


def test_t5_needs_the_slots_to_have_no_distance() -> None:
    adapter = prefixed(tiny("t5"))
    assert sum(isinstance(placement.edit, NoDistance) for placement in adapter.placements) == 1
    assert [p.port for p in adapter.placements if p.port.side == "reader"] == [Port("", "reader")]


def test_the_network_folds_into_the_table_that_serving_needs() -> None:
    model = tiny("llama")
    trained, served = prefixed(model, "mlp"), prefixed(model, "table")
    network, table = (cast(Any, adapter.get_submodule("prefix.shared")) for adapter in (trained, served))
    assert isinstance(table, Direct)
    with torch.no_grad():
        table.table.copy_(torch.cat([network(piece) for piece in network.pieces()], 1))
    ids, mask, token_map = with_slots(*batch())
    results = []
    for adapter in (trained, served):
        attachment = attach(model, adapter)
        with attachment.bind(token_map), torch.no_grad():
            results.append(model(input_ids=ids, attention_mask=mask).logits)
        attachment.detach()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "the prefix's length is 0: give 1 or more"),
        ({"form": "network"}, "the prefix's form is 'network': give mlp or table"),
        ({"init_std": -1.0}, "the prefix's init_std is -1.0: give 0 or more"),
        ({"hidden": 0}, "the prefix's hidden width is 0: give 1 or more"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Prefix(**{"length": 2, "form": "mlp", "init_std": 0.1, **settings})


def test_models_whose_keys_cannot_be_written_are_refused() -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4}
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=1, n_head=4))
    with pytest.raises(AttachError, match=r"this model's linears \(.*query_key_value.*\) do not say which make them"):
        Adapter({"prefix": Prefix(length=2, form="table", init_std=0.1)}, Anatomy.read(bloom))
    qwen3 = hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, intermediate_size=48))
    with pytest.raises(AttachError, match="normalises its keys after their linear"):
        Adapter({"prefix": Prefix(length=2, form="table", init_std=0.1)}, Anatomy.read(qwen3))


def test_a_model_with_a_sliding_window_is_refused() -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = hf.MistralForCausalLM(hf.MistralConfig(**sizes, intermediate_size=48, sliding_window=8))
    adapter = Adapter({"prefix": Prefix(length=2, form="table", init_std=0.1)}, Anatomy.read(model))
    with pytest.raises(AttachError, match="this model's attention sees 8 tokens back, and every token must read a prefix"):
        attach(model, adapter)
    model.config.sliding_window = None
    attach(model, adapter)  # control


def test_the_table_of_all_layers_is_cut_once_a_call() -> None:
    """Cut in each layer, its gradient would be made of as many tensors of its whole size as there are keys and values."""
    model = tiny("llama")
    adapter = prefixed(model, "mlp")
    table: Any = adapter.get_submodule("prefix.shared")
    cuts: list[int] = []
    pieces = table.pieces

    def counting() -> Any:
        cuts.append(1)
        return pieces()

    table.pieces = counting
    ids, mask, token_map = with_slots(*batch())
    with attach(model, adapter).bind(token_map):
        model(input_ids=ids, attention_mask=mask).logits.sum().backward()
    assert len(cuts) == 1
    assert table.up.weight.grad.abs().amax(1).gt(0).sum() > table.up.weight.shape[0] / 2
