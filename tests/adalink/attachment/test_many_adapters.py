"""Many adapters on one frozen model: a name for each row, loaded and deleted while others serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DECODERS, FAMILIES, excite, tiny
from torch import Tensor

from adalink import BASE_NAME, IA3, AdaLink, AdaptedModel, BitFit, Bridge, LoRA, Method, Prompt, TokenMap
from adalink.checkpoint.folder import CONFIG_FILE, WEIGHTS_FILE
from adalink.errors import AttachError, CheckpointError, ConfigError
from adalink.methods.prefix import Prefix
from adalink.methods.unipelt import Gated

TEXT_ONLY: dict[str, Method] = {"adalink": AdaLink(rank=4, modalities=("text",))}
FIVE: dict[str, dict[str, Method]] = {  # three methods, and slots of three counts
    "link": TEXT_ONLY,
    "link_gelu": {"adalink": AdaLink(rank=8, modalities=("text",), activation="gelu", scope="prompt")},
    "soft": {"prompt": Prompt(length=3, init_std=0.5)},
    "long": {"prompt": Prompt(length=5, init_std=0.5)},
    "both": {"prompt": Prompt(length=1, init_std=0.5), **TEXT_ONLY},
}
TEXT = {"text": ("text",)}
DEEP: dict[str, dict[str, Method]] = {  # inside the layers too, and slots without positions
    "lora": {"lora": LoRA(groups=TEXT, rank=2, alpha=4)},
    "scaled": {"ia3": IA3(groups=TEXT), "bitfit": BitFit(groups=TEXT, force_bias=True)},
    "prefix": {"prefix": Prefix(length=2, form="table", init_std=0.5)},
    "long": {"prompt": Prompt(length=5, init_std=0.5)},
    "unipelt": {
        "lora": Gated(inner=LoRA(groups=TEXT, rank=2, alpha=4, targets=("query", "value"))),
        "prefix": Gated(inner=Prefix(length=3, form="mlp", init_std=0.5, hidden=8)),
    },
}
DEEP_NAMES = ["prefix", BASE_NAME, "lora", "unipelt", "long", "scaled", BASE_NAME]
NAMES = ["soft", "link", BASE_NAME, "long", "both", BASE_NAME, "link_gelu"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def served(family: str, names: Sequence[str] = (), methods: dict[str, dict[str, Method]] = FIVE) -> AdaptedModel:
    """The same weights for an adapter whatever others are there, and large enough for every row to say something else."""
    model = AdaptedModel(tiny(family))
    for name in names or methods:
        torch.manual_seed(list(methods).index(name))
        adapter = model.add_adapter(name, methods[name]).double()
        for seed in range(3):
            excite(adapter, seed)
    return model


def prompts(n_rows: int = len(NAMES), side: str = "left") -> dict[str, Any]:
    """Rows of 4, 5 and 6 words in turn."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(n_rows, 6, dtype=torch.int64)
    for i in range(n_rows):
        words = torch.randint(3, 64, (4 + i % 3,), generator=generator)
        ids[i, slice(6 - len(words), 6) if side == "left" else slice(0, len(words))] = words
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def row(inputs: dict[str, Tensor], i: int) -> dict[str, Any]:
    """One row alone, without padding."""
    real = inputs["attention_mask"][i].bool()
    return {name: value[i : i + 1, real] for name, value in inputs.items()}


@pytest.mark.parametrize("names, methods", [(NAMES, FIVE), (DEEP_NAMES, DEEP)], ids=["input_side", "deep"])
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_generates_what_its_rows_generate_alone(family: str, beams: int, names: list[str], methods: dict[str, dict[str, Method]]) -> None:
    model, inputs = served(family, methods=methods), prompts()
    settings = {**SETTINGS, "num_beams": beams, "no_repeat_ngram_size": 1, "suppress_tokens": [0]}  # tied heads would say one word again and again
    mixed = model.generate(**inputs, **settings, adapter_names=names)
    for i, name in enumerate(names):
        alone = model.generate(**row(inputs, i), **settings, adapter_names=[name])
        assert torch.equal(mixed[i, -6:], alone[0, -6:])
    others = model.generate(**inputs, **settings, adapter_names=names[1:] + names[:1])
    assert sum(not torch.equal(a, b) for a, b in zip(mixed, others, strict=True)) > 4  # control: the adapter matters
    if family in DECODERS:
        assert torch.equal(mixed[:, :6], inputs["input_ids"])  # the prompt comes back as it was given, without slots


@pytest.mark.parametrize("names, methods", [(NAMES, FIVE), (DEEP_NAMES, DEEP)], ids=["input_side", "deep"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_five_runs_of_it_bit_for_bit(family: str, names: list[str], methods: dict[str, dict[str, Method]]) -> None:
    """At the same padded length, that is: another length is another kernel, which sums in another order (1e-15)."""
    model, inputs = served(family, methods=methods), prompts()
    more = {"decoder_input_ids": torch.tensor([[0, 5, 6]]).expand(len(names), -1)} if family == "t5" else {}
    mixed = model(**inputs, **more, adapter_names=names).logits
    for name in {*names} - {BASE_NAME, "long"}:
        only = served(family, (name, "long"), methods)  # the longest keeps its row, so that the length stays
        logits = only(**inputs, **more, adapter_names=[n if n in (name, "long") else BASE_NAME for n in names]).logits
        for i, served_by in enumerate(names):
            if served_by in (name, "long", BASE_NAME):
                assert torch.equal(logits[i], mixed[i])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss_are_those_of_the_callers_own_tokens(family: str, side: str) -> None:
    model, inputs = served(family), prompts(side=side)
    if family == "gpt2" and side == "left":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)  # its table counts padding otherwise
    is_first = inputs["attention_mask"].cumsum(1) == 1  # what stands before it is a slot in one row, and nothing in another
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | is_first, -100)
    output = model(**inputs, labels=labels, adapter_names=NAMES)
    assert output.logits.shape[:2] == labels.shape
    total, n = 0.0, 0
    for i, name in enumerate(NAMES):
        alone = model(**row(inputs, i), labels=row({**inputs, "l": labels}, i)["l"], adapter_names=[name])
        real = slice(None) if family == "t5" else inputs["attention_mask"][i].bool()
        if family != "t5":  # the decoder reads the labels, which are padded here as the ids are
            torch.testing.assert_close(output.logits[i][real], alone.logits[0], rtol=0, atol=1e-6 if family in ("llama", "qwen2") else 1e-12)
        n_targets = int((labels[i] != -100).sum())
        total, n = total + alone.loss.item() * n_targets, n + n_targets
    if family != "t5" or side == "right":
        assert output.loss.item() == pytest.approx(total / n, abs=1e-6)


def test_the_active_adapter_serves_rows_that_name_none() -> None:
    model, inputs = served("opt"), prompts()
    model.set_adapter("soft")
    assert torch.equal(model(**inputs).logits, model(**inputs, adapter_names=["soft"] * 7).logits)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, tiny("opt")(**inputs).logits)
    assert torch.equal(model(**inputs, adapter_names=[BASE_NAME] * 7).logits, tiny("opt")(**inputs).logits)


def test_unknown_names_are_refused_and_the_known_ones_named() -> None:
    model, inputs = served("opt"), prompts(2)
    known = r"this model has link, link_gelu, soft, long, both \(and __base__ for none of them\)"
    for call in (model, model.generate):
        with pytest.raises(ConfigError, match=f"there is no adapter 'sofd': {known}"):
            call(**inputs, adapter_names=["sofd", "soft"])
        with pytest.raises(ConfigError, match="1 adapter names were given for 2 rows: give one for each row"):
            call(**inputs, adapter_names=["soft"])
    with pytest.raises(ConfigError, match=f"there is no adapter 'sofd': {known}"):
        model.delete_adapter("sofd")
    with pytest.raises(ConfigError, match="the adapter's name is '__base__'"):
        model.add_adapter(BASE_NAME, TEXT_ONLY)


def test_names_and_a_token_map_are_not_both_taken() -> None:
    model, inputs = served("opt"), prompts(1)
    token_map = TokenMap(torch.zeros(1, 6, dtype=torch.int64), model.rows(1))
    for call in (model, model.generate):
        with pytest.raises(ConfigError, match="adapter_names and a token_map were both given"):
            call(**inputs, token_map=token_map, adapter_names=["soft"])


def test_others_stay_as_they_are_while_adapters_come_and_go(tmp_path: Path) -> None:
    model, inputs = served("opt"), prompts(3)
    names = ["both", "soft", BASE_NAME]
    before = model(**inputs, adapter_names=names).logits
    model.set_adapter("soft")
    model.save_pretrained(tmp_path)
    model.delete_adapter("link")
    assert (list(model.adapters), model.active) == (["link_gelu", "soft", "long", "both"], "soft")
    assert torch.equal(model(**inputs, adapter_names=names).logits, before)
    model.load_adapter(tmp_path, "again").double()
    model.adapters["again"].load_state_dict(model.adapters["soft"].state_dict())
    assert torch.equal(model(**inputs, adapter_names=names).logits, before)
    assert torch.equal(model(**inputs, adapter_names=["both", "again", BASE_NAME]).logits, before)
    model.delete_adapter("again")
    assert model.active is None
    assert torch.equal(model(**inputs).logits, tiny("opt")(**inputs).logits)


def test_a_token_map_outlives_what_comes_and_goes_but_not_its_own_adapter() -> None:
    model, inputs = served("opt"), prompts(2)
    domain = torch.where(inputs["attention_mask"] == 1, 0, -1)
    rows = model.serving(2, ["link_gelu", "link"])
    token_map = TokenMap(domain, rows.row, serving=rows.serving)
    before = model(**inputs, token_map=token_map).logits
    model.delete_adapter("soft")
    model.delete_adapter("long")
    excite(model.add_adapter("new", TEXT_ONLY).double(), 9)
    assert model.indices == {"link": 0, "link_gelu": 1, "both": 4, "new": 5}  # an index is never given twice
    assert torch.equal(model(**inputs, token_map=token_map).logits, before)
    model.delete_adapter("link")
    with pytest.raises(AttachError, match=r"names adapters by the row indices \[0\], which are not attached \(attached: \[1, 4, 5\]\)"):
        model(**inputs, token_map=token_map)


def test_checkpointing_outlives_adapters_added_and_deleted() -> None:
    model, inputs = served("llama"), prompts(2)
    model.attachment.checkpoint_layers()
    excite(model.add_adapter("late", TEXT_ONLY).double(), 7)
    model.delete_adapter("link")
    layers: list[Any] = [model.attachment.stack.get_submodule(name) for name in model.anatomy.layers]
    assert all("forward" in vars(layer) for layer in layers)
    calls: list[int] = []
    layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(**inputs).logits.sum().backward()
    assert len(calls) == 2  # once forward, once again for the gradient
    gradients = [parameter.grad for parameter in model.adapters["late"].parameters()]
    plain = AdaptedModel(tiny("llama"))
    plain.add_adapter("late", TEXT_ONLY).double().load_state_dict(model.adapters["late"].state_dict())
    plain(**inputs).logits.sum().backward()
    for gradient, parameter in zip(gradients, plain.adapters["late"].parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=0)
    model.unload()
    assert not any("forward" in vars(layer) for layer in layers)


def state(model: AdaptedModel) -> tuple[Any, ...]:
    hooks = [(*module._forward_hooks, *module._forward_pre_hooks) for module in model.base.modules()]
    return list(model.adapters), model.active, dict(model.indices), dict(model.tasks), dict(model.attachment.at), model.attachment.served, hooks


def test_a_failure_to_load_leaves_everything_as_it_was(tmp_path: Path) -> None:
    model, inputs = served("opt"), prompts(2)
    model.save_pretrained(tmp_path)
    before, logits = state(model), model(**inputs).logits
    whole = {name: (tmp_path / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    faults = [
        (WEIGHTS_FILE, whole[WEIGHTS_FILE][:-9], "x", CheckpointError, "is damaged"),
        (CONFIG_FILE, whole[CONFIG_FILE][:-9], "x", CheckpointError, "is not an adapter config"),
        (CONFIG_FILE, whole[CONFIG_FILE].replace(b'"length": 1', b'"length": 2'), "x", CheckpointError, r"soft\.table is \(1, 32\), and this model needs \(2, 32\)"),
        (CONFIG_FILE, whole[CONFIG_FILE].replace(b'"text"', b'"image"'), "x", ConfigError, "the edit adalink.image is for image tokens"),
        (CONFIG_FILE, whole[CONFIG_FILE], "soft", ConfigError, "the adapter's name is 'soft'"),
    ]
    for file, content, name, kind, message in faults:
        for known, good in whole.items():
            (tmp_path / known).write_bytes(content if known == file else good)
        with pytest.raises(kind, match=message):
            model.load_adapter(tmp_path, name)
        assert state(model) == before
    assert torch.equal(model(**inputs).logits, logits)


def test_an_adapter_that_cannot_be_placed_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = served("opt")
    before = state(model)
    base: Any = model.base
    base.model.decoder.layers[0].compile(backend="eager")
    with pytest.raises(AttachError, match="the model is already compiled"):
        model.add_adapter("late", TEXT_ONLY)
    assert state(model) == before


def test_each_adapter_keeps_the_task_it_was_saved_with(tmp_path: Path) -> None:
    model = served("opt")
    for name in ("soft", "long"):
        model.set_adapter(name)
        model.task = {"task": name}
        model.save_pretrained(tmp_path / name)
    again = AdaptedModel(tiny("opt"))
    for name in ("soft", "long"):
        again.load_adapter(tmp_path / name, name)
    assert again.tasks == {"soft": {"task": "soft"}, "long": {"task": "long"}}
    again.set_adapter("soft")
    assert again.task == {"task": "soft"}
    again.delete_adapter("soft")
    assert again.task == {}
    with pytest.raises(ConfigError, match="no adapter is active"):
        again.task = {}


def test_an_adapter_that_serves_no_row_is_not_run() -> None:
    model, inputs = served("opt"), prompts(2)
    calls: list[str] = []
    for name in ("link", "soft"):
        served_by: Any = model.adapters[name]
        served_by.placements[0].edit.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(**inputs, adapter_names=["link", BASE_NAME])
    assert calls == ["link"]


def test_an_unloaded_model_serves_nothing_more() -> None:
    model = served("opt")
    base = model.base
    assert model.unload() is base
    assert not model.adapters
    with pytest.raises(AttachError, match="this attachment was detached and serves nothing any more"):
        model.add_adapter("new", TEXT_ONLY)
    inputs = prompts(1)
    assert torch.equal(base(**inputs).logits, tiny("opt")(**inputs).logits)


def embedded(model: AdaptedModel, ids: Tensor) -> Any:
    """The frozen model's embeddings [B, T, D]."""
    base: Any = model.base
    return base.get_input_embeddings()(ids)


def test_slots_go_where_they_fit_or_are_refused() -> None:
    model, inputs = served("llama"), prompts(2)
    message = "an adapter of this batch puts slots into its rows, and {} cannot be made to fit them"
    refused: list[tuple[dict[str, Any], str]] = [
        ({"logits_to_keep": 1}, "logits_to_keep"),
        ({"return_dict": False}, "return_dict=False"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "attention_mask"),
        ({"position_ids": torch.zeros(3, 2, 6, dtype=torch.int64)}, "position_ids"),
        ({"image_embeds_position_mask": torch.zeros(2, 6)}, "image_embeds_position_mask"),
    ]
    for more, name in refused:
        with pytest.raises(ConfigError, match=message.format(name)):
            model(**{**inputs, **more}, adapter_names=["soft", "soft"])
    with pytest.raises(ConfigError, match=message.format("inputs_embeds")):
        model(inputs_embeds=embedded(model, inputs["input_ids"]), adapter_names=["soft", "link"])


def test_embeddings_alone_are_enough_where_no_row_has_slots() -> None:
    model, inputs = served("llama"), prompts(2)
    embeds = embedded(model, inputs["input_ids"])
    names = ["link", BASE_NAME]
    by_embeds = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], adapter_names=names).logits
    assert torch.equal(by_embeds, model(**inputs, adapter_names=names).logits)


def test_pictures_are_not_invented_for_a_bridge() -> None:
    from tiny import INPUTS

    model = AdaptedModel(tiny("llama"), inputs=INPUTS)
    model.add_adapter("one", {"bridge": Bridge(kind="linear")})
    with pytest.raises(ConfigError, match="an adapter with a bridge or with percepts needs images, and plain ids bring none"):
        model(**prompts(1))


def test_several_tokens_after_a_cache_are_refused_and_one_is_a_generated_one() -> None:
    model = served("llama")
    model.set_adapter("link")
    inputs = prompts(1, side="right")
    ids = torch.randint(3, 64, (1, 6))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="2 tokens were given after 6 cached ones, and nothing says what they are"):
        model(ids[:, :2], past_key_values=cache)
    model.set_adapter("link_gelu")  # edits the prompt alone
    stepped = model(ids[:, :1], past_key_values=model(ids, use_cache=True).past_key_values).logits
    labels = torch.cat([torch.full_like(ids, -100), ids[:, :1]], 1)
    whole = model(torch.cat([ids, ids[:, :1]], 1), labels=labels).logits
    torch.testing.assert_close(stepped[:, -1], whole[:, -1], rtol=0, atol=1e-6)
    assert inputs["input_ids"].shape == (1, 6)


def test_lengths_that_count_the_prompt_do_not_count_slots() -> None:
    model, inputs = served("opt"), prompts(3)
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    ids = model.generate(**inputs, **settings, max_length=9, adapter_names=["long", "link", BASE_NAME])
    assert ids.shape == (3, 9)
    assert torch.equal(ids, model.generate(**inputs, **settings, max_new_tokens=3, adapter_names=["long", "link", BASE_NAME]))


def test_padding_is_found_in_the_ids_where_generation_is_given_no_mask() -> None:
    model, inputs = served("opt"), prompts(3)
    names = ["long", "link", "soft"]
    with_mask = model.generate(**inputs, **SETTINGS, adapter_names=names)
    assert torch.equal(model.generate(inputs["input_ids"], **SETTINGS, adapter_names=names), with_mask)
    several = model.generate(**inputs, **SETTINGS, num_beams=3, num_return_sequences=2, return_dict_in_generate=True, adapter_names=names)
    assert torch.equal(several.sequences[::2, :6], inputs["input_ids"])
    assert several.sequences.shape == (6, 12)
