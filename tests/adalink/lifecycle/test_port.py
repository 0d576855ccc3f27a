"""An adapter on an updated base: the reference computation, the drift, and what a loader would take and a port refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantiser import find_torchao
from safetensors.torch import load_file
from shared import fixtures
from tiny import INPUTS, excite, tiny
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adalink import AdaLink, AdaptedModel, Bridge, FrozenPart, LoRA, Method, to_peft
from adalink.checkpoint.fingerprint import Sketch
from adalink.checkpoint.folder import read_config
from adalink.checkpoint.precision import Precision, settle
from adalink.errors import CheckpointError
from adalink.lifecycle.port import Base, drift_of, port

METHODS: dict[str, Method] = {"adalink": AdaLink(rank=4, modalities=("text",)), "lora": LoRA(rank=2)}
WORDS = {token: f"w{token}" for token in range(60)}  # of 64 rows
IDS: dict[str, int | None] = {"pad": 0, "bos": 1, "eos": 2, "image": None}


# ----------------------------------------
# The reference computation.


def drifted(facts: dict[str, Any], tensors: dict[str, Tensor], eps: float) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**facts["llama"])).double().eval()
    base = {name.removeprefix("base."): value for name, value in tensors.items() if name.startswith("base.")}
    model.load_state_dict({name: value.double() + eps * tensors[f"drift.{name}"].double() for name, value in base.items()})
    return model


def test_logits_of_a_ported_adapter_are_the_references_and_its_effect_changes_in_proportion() -> None:
    for file in sorted(fixtures("port").glob("*.json")):
        facts, tensors = json.loads(file.read_text()), load_file(file.with_suffix(".safetensors"))
        rank = len(tensors["adapter.text.down"])
        methods: dict[str, Method] = {
            "text": AdaLink(rank=rank, modalities=("text",)),
            "lora": LoRA(rank=facts["r"], alpha=facts["alpha"], targets=("q_proj", "v_proj"), groups={"all": ("all",)}),
        }
        effects = {}
        for eps in facts["eps"]:
            model = AdaptedModel(drifted(facts, tensors, eps))
            adapter = model.add_adapter("ported", methods).double()
            own = {
                name.replace("text.text.", "text.").replace("lora.all.", "layers.").removesuffix(".weight"): one for name, one in adapter.named_parameters()
            }
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(tensors[f"adapter.{name}"])
                ported = model(input_ids=tensors["in.ids"]).logits
                with model.disable_adapter():
                    plain = model(input_ids=tensors["in.ids"]).logits
            assert (plain - tensors[f"logits.eps{eps}.plain"]).abs().max() < 1e-5
            assert (ported - tensors[f"logits.eps{eps}.ported"]).abs().max() < 1e-5
            effects[eps] = ported - plain
        relative = {eps: float((effect - effects[0.0]).norm() / effects[0.0].norm()) for eps, effect in effects.items()}
        for eps, expected in facts["relative_change_of_the_adapters_effect"].items():
            assert relative[float(eps)] == pytest.approx(expected, abs=1e-5)
        small = [relative[eps] / eps for eps in facts["eps"] if 0 < eps < 0.01]
        assert max(small) / min(small) < 1.05
        assert len(small) > 1


# ----------------------------------------
# Checks.


def base_of(model: nn.Module, *, inputs: Any = None, parts: dict[str, FrozenPart] | None = None, **known: Any) -> Base:
    adapted = AdaptedModel(model, inputs=inputs)
    own = dataclasses.replace(adapted.parts["language_model"], tokenizer=known.pop("tokenizer", ""))
    adapted.parts.update({"language_model": own, **(parts or {})})
    return Base(adapted=adapted, **{"words": WORDS, "ids": IDS, **known})


def saved(folder: Path, base: Base, methods: dict[str, Method] = METHODS) -> Path:
    excite(base.adapted.add_adapter("one", methods))
    base.adapted.save_pretrained(folder)
    base.adapted.delete_adapter("one")
    return folder


def moved(family: str = "llama", eps: float = 0.01, **settings: Any) -> nn.Module:
    model = tiny(family, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(eps * parameter.std() * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def test_a_port_changes_what_the_adapter_is_bound_to_and_the_old_base_then_refuses_it(tmp_path: Path) -> None:
    old, new = base_of(tiny("llama")), base_of(moved())
    report = port(saved(tmp_path / "a", old), new, old=old)
    config = read_config(tmp_path / "a")
    assert report.config == dataclasses.replace(config, base=new.adapted.parts)
    assert config.base["language_model"].fingerprint != new.part.fingerprint
    report.config.check_base(new.adapted.parts, "ported")
    with pytest.raises(CheckpointError, match=f"{new.part.fingerprint}.*but this one is.*{old.part.fingerprint}"):
        report.config.check_base(old.adapted.parts, "ported")
    assert "all 60 token ids mean the same words" in report.checks
    assert json.loads(json.dumps(report.as_json()))["drift"][0]["relative"] == report.drift[0].relative


def test_drift_is_the_norm_of_what_changed_by_that_of_what_was_the_greatest_first(tmp_path: Path) -> None:
    old, new = base_of(tiny("llama")), base_of(moved())
    found = drift_of(old, new)
    was, now = dict(old.adapted.base.named_parameters()), dict(new.adapted.base.named_parameters())
    assert {one.name for one in found} == {name for name, value in was.items() if value.dim() > 1}
    for one in found:
        before, after = was[one.name].detach(), now[one.name].detach()
        if "embed_tokens" in one.name or "lm_head" in one.name:
            before, after = before[:60], after[:60]  # the words that there are: a table may end in rows of nothing
        if before.shape == was[one.name].shape:
            assert abs(one.relative - float((after - before).norm() / before.norm())) < 1e-12
    assert [one.relative for one in found] == sorted((one.relative for one in found), reverse=True)
    assert not any(one.is_rounding for one in found)
    same = drift_of(old, base_of(tiny("llama")))
    assert {one.relative for one in same} == {0.0}


def test_weights_in_another_precision_are_found_to_be_the_same(tmp_path: Path) -> None:
    old, half = base_of(tiny("llama")), base_of(tiny("llama").half())
    report = port(saved(tmp_path / "a", old), half, old=old)
    assert "the weights are those of the old model, rounded to another precision at most" in report.checks
    assert 0 < report.drift[0].relative < 1e-3
    assert "rounded" not in " ".join(port(tmp_path / "a", base_of(moved(eps=1e-6)), old=old).checks)


def test_rows_that_only_pad_a_table_do_not_count() -> None:
    old, model = base_of(tiny("llama")), tiny("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[60:] = 1e6
    found = {one.name: one.relative for one in drift_of(old, base_of(model))}
    assert found["model.embed_tokens.weight"] == 0
    assert max(found.values()) == 0


def vision(name: str, pixels: float = 0.5, shape: tuple[int, ...] = (1, 3, 20), fingerprint: str = "1" * 16) -> FrozenPart:
    sketches = {"pixels": Sketch((3, 8, 8), (0.0, pixels, 1.0)), "features": Sketch(shape, (0.0, 1.0))}
    return FrozenPart(name=name, fingerprint=fingerprint, sketches=sketches)


def swapped(model: nn.Module) -> Base:
    """A vocabulary of the same size in another order."""
    return base_of(model, words={**WORDS, 17: "w18", 18: "w17"})


REFUSED: dict[str, tuple[Any, str]] = {
    "other width": (lambda: base_of(tiny("opt")), "was trained on a model with hidden_size 32, and OPTForCausalLM has 48: train an adapter on the new model"),
    "fewer layers": (lambda: base_of(tiny("llama", n_layers=1)), r"has 2 layers of width 32, and .* has 1 layers of width 32: train an adapter on the new model"),
    "permuted vocabulary": (lambda: swapped(moved()), r"2 of 60 token ids mean other words in LlamaForCausalLM \(first: 17 'w17' -> 'w18'\)"),
    "shorter vocabulary": (lambda: base_of(moved(), words={id: WORDS[id] for id in range(50)}), r"10 of 60 token ids mean other words .*\(first: 50 'w50' -> None\)"),
    "other image id": (lambda: base_of(moved(), ids={**IDS, "image": 7}), "the image token is None in LlamaForCausalLM and 7 in LlamaForCausalLM"),
    "other pad id": (lambda: base_of(moved(), ids={**IDS, "pad": 9}), "the pad token is 0 in LlamaForCausalLM and 9 in LlamaForCausalLM"),
    "other chat": (lambda: base_of(moved(), chat_template="<user>"), r"have other chat templates \('' and '<user>'\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_means_another_thing_on_the_new_base_is_refused_with_both_values(what: str, tmp_path: Path) -> None:
    make, stated = REFUSED[what]
    old = base_of(tiny("llama"))
    folder = saved(tmp_path / "a", old)
    port(folder, base_of(moved()), old=old)  # the control: an update of the same model is taken
    with pytest.raises(CheckpointError, match=stated):
        port(folder, make(), old=old)


def test_a_loader_takes_a_permuted_vocabulary_which_a_port_finds_by_its_words_or_its_digest(tmp_path: Path) -> None:
    old = base_of(tiny("llama"), tokenizer="a" * 16)
    folder = saved(tmp_path / "a", old)
    other = base_of(moved(), tokenizer="b" * 16, words={})
    assert other.adapted.load_adapter(folder, "one", allow_other_base=True) is not None  # the control: names and sizes fit
    with pytest.raises(CheckpointError, match=r"was trained with another tokenizer, and LlamaForCausalLM has b{16}: give the model it was trained on"):
        port(folder, other)
    report = port(folder, base_of(moved(), tokenizer="a" * 16, words={}))
    assert "the tokenizer is the same" in report.checks
    assert report.drift == ()
    assert any("without the old model" in check for check in report.checks)
    with pytest.raises(CheckpointError, match=r"does not say which tokenizer it was trained with, and LlamaForCausalLM has a{16}"):
        port(saved(tmp_path / "old", base_of(tiny("llama"))), base_of(moved(), tokenizer="a" * 16))


def test_a_longer_vocabulary_whose_old_ids_agree_is_accepted(tmp_path: Path) -> None:
    old = base_of(tiny("llama"))
    report = port(saved(tmp_path / "a", old), base_of(moved(), words={**WORDS, 60: "new", 61: "words"}), old=old)
    assert "all 60 token ids mean the same words; the new model has 2 more" in report.checks


def test_images_that_are_prepared_otherwise_or_have_other_features_are_refused(tmp_path: Path) -> None:
    methods: dict[str, Method] = {**METHODS, "bridge": Bridge(kind="linear")}

    def on(part: FrozenPart) -> Base:
        return base_of(moved(), inputs=INPUTS, parts={"encoder": part})

    old = base_of(tiny("llama"), inputs=INPUTS, parts={"encoder": vision("vit")})
    folder = saved(tmp_path / "a", old, methods)
    report = port(folder, on(vision("vit2", fingerprint="2" * 16)), old=old)
    assert "features of a test image differ by 0.0 % of their range" in report.checks
    assert report.config.base["encoder"].name == "vit2"
    with pytest.raises(CheckpointError, match="vit prepares an image as 3 x 8 x 8, from 0 to 1, and vit2 as 3 x 8 x 8, from -1 to 1"):
        port(folder, on(vision("vit2", pixels=-1.0, fingerprint="2" * 16)), old=old)
    with pytest.raises(CheckpointError, match="vit gives 3 x 20 features of an image, and vit2 4 x 20: train an adapter on the new encoder"):
        port(folder, on(vision("vit2", shape=(1, 4, 20), fingerprint="2" * 16)), old=old)
    with pytest.raises(CheckpointError, match=r"was trained on .* and the encoder vit, and the new base is the language model .*: give the encoder"):
        port(folder, base_of(moved()), old=old)
    bare = dataclasses.replace(vision("vit"), sketches={})
    unknown = saved(tmp_path / "b", base_of(tiny("llama"), inputs=INPUTS, parts={"encoder": bare}), methods)
    with pytest.raises(CheckpointError, match=r"does not say how vit prepares images, so vit2 cannot be compared with it: give the old parts \(--old\)"):
        port(unknown, on(vision("vit2", fingerprint="2" * 16)), old=base_of(tiny("llama"), inputs=INPUTS, parts={"encoder": bare}))


def test_a_table_of_another_scale_is_refused_unless_it_is_accepted(tmp_path: Path) -> None:
    old, model = base_of(tiny("llama")), tiny("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2.1)
    folder = saved(tmp_path / "a", old)
    with pytest.raises(CheckpointError, match=r"has a root mean square of 0\.15., and that of .* of 0\.3..: edits of inputs are in units of that table"):
        port(folder, base_of(model), old=old)
    assert any(check.startswith("warning: the embedding table") for check in port(folder, base_of(model), old=old, accept=True).checks)


def test_settings_that_change_what_is_computed_are_warnings(tmp_path: Path) -> None:
    old, model = base_of(tiny("llama")), moved()
    model.config.max_position_embeddings = 77  # type: ignore[union-attr]
    checks = port(saved(tmp_path / "a", old), base_of(model), old=old).checks
    assert [check for check in checks if check.startswith("warning")] == [
        "warning: max_position_embeddings is 2048 in the old model and 77 in the new one"
    ]


def test_an_old_base_that_is_not_the_adapters_is_refused(tmp_path: Path) -> None:
    old = base_of(tiny("llama"))
    with pytest.raises(CheckpointError, match="was trained on the language model"):
        port(saved(tmp_path / "a", old), base_of(moved()), old=base_of(moved(eps=0.1)))


def test_an_update_that_unties_the_head_has_a_drift_of_its_own(tmp_path: Path) -> None:
    old, model = base_of(tiny("gpt2")), tiny("gpt2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(1.5 * model.lm_head.weight.detach())
    found = {one.name: one.relative for one in drift_of(old, base_of(model))}
    assert found["lm_head.weight"] == pytest.approx(0.5)
    assert found["transformer.wte.weight"] == 0


def test_drift_of_quantised_weights_is_that_of_the_values_that_they_stand_for() -> None:
    find_torchao()
    old, model = base_of(tiny("llama")), tiny("llama").float()
    settle(model, Precision(quantise="int8"), "tiny")
    found = {one.name: one.relative for one in drift_of(old, base_of(model))}
    name = "model.layers.0.self_attn.q_proj.weight"
    plain = tiny("llama").get_parameter(name)
    expected = (model.get_parameter(name).dequantize().double() - plain).norm() / plain.norm()
    assert found[name] == pytest.approx(float(expected), rel=1e-9)
    assert 0 < found[name] < 0.01


# ----------------------------------------
# A LoRA of peft.


def of_peft(folder: Path) -> tuple[Path, Base]:
    old = base_of(tiny("llama"))
    adapter = old.adapted.add_adapter("one", {"lora": LoRA(rank=2, groups={"all": ("all",)})})
    excite(adapter)
    to_peft(adapter, old.adapted.base, folder)
    old.adapted.delete_adapter("one")
    return folder, old


def test_a_lora_of_peft_is_checked_beside_the_old_base(tmp_path: Path) -> None:
    folder, old = of_peft(tmp_path / "peft")
    new = base_of(moved())
    report = port(folder, new, old=old)
    assert report.config.base == {"language_model": new.part}
    assert report.drift == drift_of(old, new)
    with pytest.raises(CheckpointError, match=r"is of the peft library, whose folders name no tokenizer: give the model it was trained on \(--old\)"):
        port(folder, new)
    with pytest.raises(CheckpointError, match="2 of 60 token ids mean other words"):
        port(folder, swapped(moved()), old=old)
    with pytest.raises(CheckpointError, match=r"has no place in LlamaForCausalLM: .*layers\.1\."):
        port(folder, base_of(tiny("llama", n_layers=1)), old=old)
