"""LST beside decoders: parity with the files, what equals the frozen model, what is stored, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any, Literal

import pytest
import torch
from double import InDouble
from fixture_file import FixtureFile
from hosts import host
from shared import fixtures
from tiny import FAMILIES, INPUTS, excite, rows, run, tiny, token_map
from tiny_families import SETTINGS, tiny_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache, T5Config, T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.t5.modeling_t5 import T5LayerNorm

from adalink import (
    ANSWER,
    BASE_ROW,
    EMBEDDING,
    IMAGE,
    PAD,
    PROMPT,
    TEXT,
    Adapter,
    Anatomy,
    Bottleneck,
    Bridge,
    Ladder,
    LoRA,
    Method,
    Placement,
    Prefix,
    Prompt,
    TokenMap,
    Tokens,
    attach,
)
from adalink.anatomy import FrozenModule
from adalink.attachment import beside
from adalink.errors import AttachError, ConfigError
from adalink.methods.pruned import importances, start_pruned

FILES = sorted(fixtures("lst").glob("*.safetensors"))


def files(key: str) -> pytest.MarkDecorator:
    """The files whose .json has a key: LST of decoders says its `rungs`, of T5 its `side`."""
    found = [FixtureFile.read(path) for path in FILES]
    return pytest.mark.parametrize("case", [case for case in found if key in case.spec], ids=lambda case: case.spec["fixture"])


def weight(name: str) -> str:
    """A tensor's name in a file, as an adapter names it."""
    part, _, rest = name.partition(".")
    number, _, inner = rest.partition(".")
    names = {"start": f"start.down.{rest}", "down": f"rungs.{number}.down.{inner}", "gate": f"rungs.{number}.gate", "block": f"rungs.{number}.block.{inner}"}
    return "ladder." + names.get(part, f"end.{name}")


@files("rungs")
def test_it_equals_the_files(case: FixtureFile) -> None:
    with InDouble():
        model: Any = host({"model_type": case.spec["family"], **case.spec["config"]}, case.under("w."))
        method = Ladder(reduction=case.spec["reduction"], rungs=tuple(case.spec["rungs"]), output=case.spec["output"], gate_temperature=case.spec["gate_temperature"])
        adapter = Adapter({"ladder": method}, Anatomy.read(model)).double()
        adapter.load_state_dict({weight(name): value for name, value in case.under("side.").items()})
        attachment = attach(model, adapter)
        ids, mask, labels, positions = (case.tensors[f"in.{name}"] for name in ("input_ids", "attention_mask", "labels", "position_ids"))
        domain = torch.where(mask == 1, TEXT, PAD)
        with attachment.bind(TokenMap(domain, torch.zeros(len(ids), dtype=torch.int64))):
            logits: Any = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            loss: Any = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            loss.backward()
            real = mask.bool()
            close(logits[real], case.tensors["out.logits"][real])
            close(loss, case.tensors["out.loss"])
            own = dict(adapter.named_parameters())
            for name, gradient in case.under("grad.").items():
                close(own[weight(name)].grad, gradient)
            for beams in (1, 3):
                for use_cache in (True, False):
                    found = model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, num_beams=beams, do_sample=False, use_cache=use_cache)
                    assert torch.equal(found, case.tensors[f"gen.beams{beams}"])


def t5_weight(name: str) -> str:
    """As `weight`, in a file of an encoder and a decoder."""
    stack, _, rest = name.partition(".")
    if "visual_embedding." in rest:
        return f"visual.image.{rest.partition('.')[2]}"
    if not rest.startswith(("side_", "final_side")):
        return f"ladder.decoder.end.up.{rest}"
    part, _, rest = rest.partition(".")
    number, _, inner = rest.partition(".")
    own = {"side_first_downsample": f"start.down.{rest}", "side_downsamples": f"rungs.{number}.down.{inner}", "side_gate_params": f"rungs.{number}.gate",
           "side_block": f"rungs.{number}.block.{inner}", "final_side_layer_norm": f"end.norm.{rest}"}  # fmt: skip
    return f"ladder.{stack}.{own[part]}"


def all_or(rungs: list[int] | None) -> Any:
    return "all" if rungs is None else tuple(rungs)


class Objects(nn.Module):
    """VL-T5's image: a feature, a place and an order for each object, written into its slot."""

    def __init__(self, width: int, words: Tensor) -> None:
        super().__init__()
        self.feat_embedding, self.absolute_vis_pos_embedding = (nn.Sequential(nn.Linear(n, width), T5LayerNorm(width, 1e-6)) for n in (12, 5))
        self.img_order_embedding = nn.Embedding(2, width)
        self.words = (words,)

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        features, boxes = tokens.inputs["features"], tokens.inputs["boxes"]
        area = (boxes[..., 1] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 2])
        places = self.absolute_vis_pos_embedding(torch.cat([boxes, area[..., None]], -1))
        return tokens.given(self.feat_embedding(features) + places + self.img_order_embedding.weight[0] + self.words[0].flip(0)[: features.shape[1]])


@dataclasses.dataclass(frozen=True)
class Visual:
    """The edit that brings VL-T5's image."""

    words: Tensor

    def slots(self, anatomy: Anatomy) -> tuple[()]:
        return ()

    def place(self, anatomy: Anatomy) -> list[Placement]:
        return [Placement("image", EMBEDDING, Objects(anatomy.width, self.words), (IMAGE,))]


@files("side")
def test_it_equals_the_authors_code_on_t5(case: FixtureFile) -> None:
    """With an image the frozen model reads the text alone, and the image stands after it in the ladder."""
    side, is_trained = case.spec["side"], re.compile("side_|final_side|visual")
    with InDouble():
        model: Any = host({"model_type": "t5", **case.spec["t5"]}, {name: value for name, value in case.under("w.").items() if not is_trained.search(name)})
        rungs, decoder = (all_or(side[f"{stack}_side_layers"]) for stack in ("encoder", "decoder"))
        inputs = {name: case.tensors[f"in.{key}"].double() for name, key in (("features", "vis_feats"), ("boxes", "boxes")) if f"in.{key}" in case.tensors}
        image: Any = "side_only" if inputs else "detached"
        ladder = Ladder(reduction=side["reduction"], rungs=rungs, decoder_rungs=decoder, gate_temperature=side["gate_temperature"], image=image)
        brings = {"visual": Visual(model.shared.weight.detach())} if inputs else {}
        adapter = Adapter({**brings, "ladder": ladder}, Anatomy.read(model)).double()
        trained = {t5_weight(name): value for name, value in case.under("w.").items() if is_trained.search(name)}
        unread = trained.keys() - dict(adapter.named_parameters()).keys()  # the gates of layers without a rung
        assert unread == {t5_weight(name) for name in case.spec.get("trainable_without_gradient", [])}
        adapter.load_state_dict({name: value for name, value in trained.items() if name not in unread})
        ids, mask, labels = (case.tensors[f"in.{name}"] for name in ("input_ids", "attention_mask", "labels"))
        domain = torch.where(mask == 1, TEXT, PAD)
        if inputs:
            n = inputs["features"].shape[1]
            ids, mask, domain = (nn.functional.pad(value, (0, n), value=more) for value, more in ((ids, 1), (mask, 1), (domain, IMAGE)))
        with attach(model, adapter).bind(TokenMap(domain, torch.zeros(len(ids), dtype=torch.int64), inputs)):
            output = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
            output.loss.backward()
            close(output.logits, case.tensors["out.logits"])
            close(output.loss, case.tensors["out.loss"])
            own, compared = dict(adapter.named_parameters()), {t5_weight(name): gradient for name, gradient in case.under("grad.").items()}
            assert compared.keys() == own.keys()
            for name, gradient in compared.items():
                close(own[name].grad, gradient)
            for use_cache in (True, False):
                given = {"attention_mask": mask, "max_new_tokens": 5, "eos_token_id": None, "do_sample": False, "use_cache": use_cache}
                found = model.generate(ids, **given, return_dict_in_generate=True, output_logits=True)
                assert torch.equal(found.sequences, case.tensors["gen.greedy"])
                close(torch.stack(found.logits, 1), case.tensors["gen.step_logits"])
            several = [model.generate(ids, **{**given, "use_cache": use_cache}, num_beams=3) for use_cache in (True, False)]
            assert torch.equal(*several)


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


# ----------------------------------------
# What equals the frozen model.


def copied_ladder(model: nn.Module) -> Adapter:
    """A ladder of the model's own width whose rungs are the model's layers, and which mixes nothing in."""
    anatomy = Anatomy.read(model)
    adapter = Adapter({"ladder": Ladder(reduction=1, alpha=10.0)}, anatomy).double()
    with torch.no_grad():
        for placement in adapter.placements:
            edit: Any = placement.edit
            root = model.get_submodule(anatomy.reader or "") if placement.port.of == "reader" else model.get_submodule(anatomy.stack)
            for linear in (getattr(edit, name) for name in ("down", "up") if hasattr(edit, name)):
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)
            for name in ("block", "norm"):
                if hasattr(edit, name):
                    getattr(edit, name).load_state_dict(root.get_submodule(placement.port.module).state_dict())
    return adapter


USUAL = ("gemma3", "gpt_neox", "bloom")  # rotations by kind of layer, rotations of a part of a head, distances
OTHERS = [name for name in SETTINGS if name not in (*FAMILIES, *USUAL, "mamba", "xglm")]  # not attention; attention that does not run in float64


@pytest.mark.parametrize("family", [*FAMILIES, *USUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_at_full_width_with_the_models_own_weights_it_is_the_frozen_model_bit_for_bit(family: str) -> None:
    model = tiny(family) if family in FAMILIES else tiny_of(family, "eager").double().requires_grad_(False)
    ids, domain, mask = rows()
    mask = mask if family in FAMILIES else torch.ones_like(mask)  # eager attention in float64 is NaN at padding
    expected = run(model, ids, mask)
    adapter = copied_ladder(model).requires_grad_(False)  # sdpa picks another kernel where T5's distances need a gradient
    with attach(model, adapter).bind(token_map(domain)):
        assert torch.equal(run(model, ids, mask), expected)
        excite(adapter, strength=0.01)
        assert not torch.equal(run(model, ids, mask), expected)  # control: it is the ladder that was read


def _loss(model: Any, sample: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**sample).loss
    return found


@files("rule")
def test_a_pruned_start_keeps_what_the_authors_code_keeps(case: FixtureFile) -> None:
    with InDouble():
        model: Any = T5ForConditionalGeneration(T5Config(**case.spec["t5"], tie_word_embeddings=True)).double().eval()
        model.load_state_dict(case.under("w."), strict=False)
        samples = [{name: case.tensors[f"in.{i}.{name}"] for name in ("input_ids", "labels")} for i in range(case.spec["n_samples"])]
        found = importances(model, [partial(_loss, model, sample) for sample in samples])
        for name, value in case.under("fisher.").items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-18)
        adapter = Adapter({"ladder": Ladder(reduction=case.spec["reduction"])}, Anatomy.read(model)).double()
        start_pruned(adapter, model, case.under("fisher."))
    own, compared = dict(adapter.named_parameters()), 0
    for name, value in case.under("pruned.").items():
        stack, _, rest = name.partition(".")
        rest = re.sub(r"^block\.(\d+)\.", r"rungs.\1.block.", rest).replace("final_layer_norm", "end.norm")
        if stack != "shared":
            assert torch.equal(own[f"ladder.{stack}.{rest}"], value.double()), name
            compared += 1
    assert compared == sum("block" in name or "norm" in name for name in own) - 2  # the tables of distances are copied whole


@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_that_prunes_nothing_away_is_the_frozen_model(family: str) -> None:
    model = tiny(family)
    ids, _, mask = rows()
    expected = run(model, ids, mask)
    adapter = copied_ladder(model).requires_grad_(False)
    drawn = Adapter(adapter.methods, adapter.anatomy).double()
    start_pruned(drawn, model, importances(model, [lambda: run(model, ids, mask).square().mean()]))
    with torch.no_grad():
        for name, parameter in drawn.named_parameters():
            if "block" in name or "norm" in name:
                assert torch.equal(parameter, dict(adapter.named_parameters())[name]), name
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(run(model, ids, mask), expected)
    half = Adapter({"ladder": Ladder(reduction=2)}, Anatomy.read(model)).double()
    before = {name: value.clone() for name, value in half.state_dict().items()}
    start_pruned(half, model, importances(model, [lambda: run(model, ids, mask).square().mean()]))
    changed = {name for name, value in half.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "block" in name or "end.norm" in name}


def test_a_start_that_cannot_be_pruned_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(AttachError, match="the adapter has no ladder whose start could be pruned, its methods are lora: add a ladder"):
        start_pruned(Adapter({"lora": LoRA(groups={"all": ("all",)}, rank=2, alpha=2)}, Anatomy.read(model)), model, {})
    gemma: Any = tiny_of("gemma2", "eager")
    adapter = Adapter({"ladder": Ladder(reduction=2)}, Anatomy.read(gemma))
    with pytest.raises(AttachError, match="a Gemma2DecoderLayer has 4 norms and 4 groups of linears, expected one norm before each pair of them: start the ladder"):
        start_pruned(adapter, gemma, {name: torch.ones_like(value) for name, value in gemma.named_parameters()})


# ----------------------------------------
# No gradient through the host.


def adapted(model: nn.Module, **more: Method) -> Adapter:
    adapter = Adapter({"bridge": Bridge(kind="linear"), "prompt": Prompt(length=2, init_std=0.5), **more}, Anatomy.read(model, INPUTS)).double()
    excite(adapter)
    return adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_that_it_reads_has_a_gradient_and_what_stands_before_the_model_gets_one(family: str) -> None:
    model = tiny(family)
    ids, domain, mask = rows()
    adapter, read = adapted(model, ladder=Ladder(reduction=2)), list[bool]()
    anatomy = Anatomy.read(model, INPUTS)
    attachment = attach(model, adapter, anatomy=anatomy)
    for layer in anatomy.layers:
        attachment.stack.get_submodule(layer).register_forward_hook(lambda *call: read.append((call[-1][0] if isinstance(call[-1], tuple) else call[-1]).requires_grad))
    with attachment.bind(token_map(domain)):
        run(model, ids, mask).square().sum().backward()
    assert read == [False] * len(anatomy.layers)
    before = {name: parameter.grad for name, parameter in adapter.named_parameters() if name.startswith(("bridge", "prompt"))}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in before.values())


def test_other_adapters_in_the_call_learn_what_they_learn_alone() -> None:
    model = tiny("llama")
    ids, domain, mask = rows()
    other, ladder = adapted(model, lora=LoRA(groups={"all": ("all",)}, rank=2, alpha=2)), adapted(model, ladder=Ladder(reduction=2))

    def gradients(row: list[int]) -> dict[str, Tensor]:
        attachment = attach(model, other, ladder, anatomy=Anatomy.read(model, INPUTS))
        with attachment.bind(token_map(domain, torch.tensor(row))):
            logits = run(model, ids, mask)[[i for i, index in enumerate(row) if index == 0]]
        attachment.detach()
        wanted = dict(other.named_parameters())
        return dict(zip(wanted, torch.autograd.grad(logits.square().sum(), list(wanted.values())), strict=True))

    alone = gradients([0, BASE_ROW, 0])
    for name, gradient in gradients([0, 1, 0]).items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-9, atol=1e-12)
    assert all(gradient.abs().max() > 0 for gradient in alone.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_that_is_in_the_ladder_alone_changes_nothing_that_the_model_makes_of_text(family: str) -> None:
    model = tiny(family)
    ids, domain, mask = rows()
    is_text = (domain == TEXT) | (domain == ANSWER)

    def outcome(image: Literal["detached", "side_only"], seed: int) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        attachment = attach(model, adapted(model, ladder=Ladder(reduction=2, image=image)), anatomy=Anatomy.read(model, INPUTS))
        states: list[Tensor] = []
        handles = [
            attachment.stack.get_submodule(layer).register_forward_hook(lambda *call: states.append((call[-1][0] if isinstance(call[-1], tuple) else call[-1])[is_text]))
            for layer in attachment.anatomy.layers
        ]
        with torch.no_grad(), attachment.bind(token_map(domain, seed=seed)):
            logits = run(model, ids, mask)
        attachment.detach()
        for handle in handles:
            handle.remove()
        return states, logits

    (alone, logits), (other, changed) = outcome("side_only", 3), outcome("side_only", 4)
    assert all(torch.equal(one, two) for one, two in zip(alone, other, strict=True))
    assert (logits - changed).abs().max() > 1e-4
    control = [outcome("detached", seed)[0] for seed in (3, 4)]
    assert not any(torch.equal(one, two) for one, two in zip(*control, strict=True))


# ----------------------------------------
# What a step stores.


def llama(n_layers: int) -> nn.Module:
    config = LlamaConfig(vocab_size=100, hidden_size=256, intermediate_size=688, num_hidden_layers=n_layers, num_attention_heads=8, max_position_embeddings=128)
    made: nn.Module = LlamaForCausalLM(config)
    return made


def stored(n_layers: int, **methods: Method) -> int:
    """Bytes that the backward pass of four texts of 128 tokens needs: of every storage once, without parameters."""
    torch.manual_seed(0)
    model: Any = llama(n_layers)
    adapter = Adapter(methods, Anatomy.read(model))
    attachment, ids = attach(model, adapter), torch.randint(0, 100, (4, 128))
    parameters = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *adapter.parameters())}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    domain = torch.where(torch.arange(128) < 8, PROMPT, TEXT).expand(4, -1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), attachment.bind(TokenMap(domain, torch.zeros(4, dtype=torch.int64))):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in parameters)


def six(n_layers: int) -> Ladder:
    return Ladder(reduction=4, rungs=tuple(range(0, n_layers, n_layers // 6)))


def test_a_step_stores_the_same_bytes_beside_6_12_and_24_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {stored(n, ladder=six(n)) for n in (6, 12, 24)}
    assert len(found) == 1
    assert round(found.pop() / 2**20, 2) == 21.26
    prompt = Prompt(length=8)
    assert len({stored(n, prompt=prompt, ladder=six(n)) for n in (6, 12)}) == 1  # also with something trained before the model
    monkeypatch.setattr(beside, "_without_gradient", lambda attachment, h, *rest: h)
    assert stored(12, prompt=prompt, ladder=six(12)) > 1.3 * stored(6, prompt=prompt, ladder=six(6))  # control: with a gradient through the layers


@pytest.mark.slow  # `adalink bench --only ladder` measures the same
def test_a_step_stores_at_most_half_and_a_sixth_of_what_lora_stores() -> None:
    lora = stored(12, lora=LoRA(groups={"all": ("all",)}, rank=8, alpha=8, targets=("query", "value")))
    assert stored(12, ladder=Ladder(reduction=4)) <= 0.50 * lora
    assert stored(12, ladder=Ladder(reduction=8, rungs=tuple(range(1, 12, 2)))) <= 0.16 * lora


# ----------------------------------------
# What is refused.


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a width": ({"reduction": 3}, "the ladder's reduction is 3, which does not divide this model's width 32, feed-forward width 48, head width 8 evenly: give 2, or"),
    "an odd head": ({"reduction": 8}, "width 32, feed-forward width 48, head width 8, and heads of 1 that are rotated in pairs evenly: give 4, or another that does"),
    "a rung": ({"rungs": (0, 2)}, "the ladder has a rung at layer 2, and this model has the layers 0 to 1: leave it out"),
    "a negative rung": ({"rungs": (-1,)}, "the ladder has a rung at layer -1, and this model has the layers 0 to 1"),
    "no rung": ({"rungs": ()}, r"the ladder's rungs are \(\): give all, or one or more layers, each once"),
    "a rung twice": ({"rungs": (1, 1)}, r"the ladder's rungs are \(1, 1\): give all"),
    "an output": ({"output": "sum"}, "the ladder's output is 'sum': give replace or add"),
    "an image": ({"image": "both"}, "the ladder's image is 'both': give detached or side_only"),
    "no reduction": ({"reduction": 0}, "the ladder's reduction is 0: give 1 or more"),
    "a temperature": ({"gate_temperature": 0.0}, "the ladder's gate_temperature is 0.0: give a number above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_fit_are_refused(name: str) -> None:
    settings, sentence = REFUSED[name]
    with pytest.raises(ConfigError, match=sentence):
        Adapter({"ladder": Ladder(**{"reduction": 4, **settings})}, Anatomy.read(tiny("llama")))


def test_methods_inside_the_layers_are_refused_beside_it() -> None:
    model = tiny("llama")
    inside: dict[str, Method] = {"lora": LoRA(groups={"all": ("all",)}, rank=2, alpha=2), "bottleneck": Bottleneck(width=2), "prefix": Prefix(length=2, form="table", init_std=0.5)}
    for name, method in inside.items():
        adapter = Adapter({"ladder": Ladder(reduction=4), name: method}, Anatomy.read(model))
        with pytest.raises(AttachError, match=f"ladder passes no gradient through the frozen layers, and {name} of the same adapter edits inside them, so it would"):
            attach(model, adapter)


def test_a_layer_that_cannot_be_narrower_and_what_is_no_language_model_are_refused() -> None:
    class Fixed(LlamaDecoderLayer):
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2), layer_idx)

    model: Any = tiny("llama")
    model.model.layers[0].__class__ = model.model.layers[1].__class__ = Fixed
    with pytest.raises(AttachError, match=r"a Fixed of a narrower width cannot be built \(.*q_proj.weight is \[32, 32\], of \[32, 32\]; settings that were divided: "):
        Adapter({"ladder": Ladder(reduction=4)}, Anatomy.read(model))
    with pytest.raises(AttachError, match="the ladder is built of a language model's own layers, and there are none here: choose another method"):
        Adapter({"ladder": Ladder(reduction=4)}, dataclasses.replace(Anatomy.read(model), host=FrozenModule()))


def test_caches_that_it_cannot_use_are_refused() -> None:
    model: Any = tiny("llama")
    ids, domain, mask = rows()
    attachment = attach(model, Adapter({"ladder": Ladder(reduction=4)}, Anatomy.read(model)).double())
    fixed = StaticCache(config=model.config, max_cache_len=40)
    with attachment.bind(token_map(domain)), pytest.raises(AttachError, match="the cache is a StaticCache whose layers are of a fixed size or kind, expected a Dynamic"):
        model(input_ids=ids, attention_mask=mask, past_key_values=fixed, use_cache=True)
    with attachment.bind(TokenMap(domain[:, :9], torch.full((3,), BASE_ROW), serving=frozenset())):
        cache = model(input_ids=ids[:, :9], attention_mask=mask[:, :9], use_cache=True).past_key_values
    with attachment.bind(token_map(domain)), pytest.raises(AttachError, match="the cache holds 9 tokens, and 0 of them were read by the network beside the model"):
        model(input_ids=ids[:, 9:], attention_mask=mask, past_key_values=cache, use_cache=True)


def test_a_decoder_whose_encoder_ran_elsewhere_is_refused() -> None:
    model: Any = tiny("t5")
    ids, domain, mask = rows()
    attachment = attach(model, Adapter({"ladder": Ladder(reduction=4)}, Anatomy.read(model)).double())
    with attachment.bind(token_map(domain)):
        encoded = model.encoder(input_ids=ids, attention_mask=mask)
    with attachment.bind(token_map(domain)), pytest.raises(AttachError, match="the decoder was given what an encoder made in another call"):
        model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids[:, :2])


def test_attention_that_is_changed_afterwards_is_followed() -> None:
    model: Any = tiny("llama").float()
    ids, domain, mask = rows()
    adapter = Adapter({"ladder": Ladder(reduction=4)}, Anatomy.read(model))
    with attach(model, adapter).bind(TokenMap(domain, torch.zeros(3, dtype=torch.int64))):
        expected = run(model, ids, mask)[mask.bool()]
        model.set_attn_implementation("eager")  # whose masks are added, where those of sdpa are of bool
        torch.testing.assert_close(run(model, ids, mask)[mask.bool()], expected, rtol=0, atol=1e-5)
