"""Models with a head that classifies: adapters with and without slots, with labels and without, and heads that are trained with the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from classifiers import CONFIGS, IDS, SIZES, host
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from shared import covering
from tiny import excite
from torch import Tensor, nn

from adalink import AdaLink, AdaptedModel, Method, Prefix, Prompt, UniPELT, from_peft, get_adalink_model, to_peft
from adalink.checkpoint.folder import WEIGHTS_FILE
from adalink.errors import CheckpointError, ConfigError
from adalink.lifecycle.export import merge_linears

TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
METHODS: dict[str, Method] = {
    "adalink": AdaLink(rank=4, modalities=("text",)),
    "unipelt": UniPELT(variant="APL", prefix_length=3, prefix_hidden=8, prefix_init_std=0.5),
    "prefix": Prefix(length=3, form="table", init_std=0.5),
    "prompt": Prompt(length=3, init_std=0.5),
}
HOSTS = [(family, task) for family in CONFIGS for task in TASKS if hasattr(hf, f"{family}For{task}")]
ENCODER_DECODERS = [("T5", "SequenceClassification"), ("T5", "QuestionAnswering"), ("Bart", "SequenceClassification"), ("Bart", "QuestionAnswering")]


def batch(task: str) -> dict[str, Tensor]:
    """Three rows, the second of them padded on the right, each with an end token that encoder-decoder models pool at."""
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    ids[1, 5:], ids[[0, 1, 2], [6, 4, 6]] = 0, 2
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    return {name: torch.stack([value, value.flip(0)], 1) for name, value in inputs.items()} if task == "MultipleChoice" else inputs


def labels(task: str) -> dict[str, Tensor]:
    if task == "QuestionAnswering":
        return {"start_positions": torch.tensor([1, 0, 6]), "end_positions": torch.tensor([2, 4, 6])}
    marked = torch.tensor([[0, 1, 2, 0, 1, 2, 0], [1, 1, 0, 0, 2, -100, -100], [2, 2, 1, 0, 0, 1, -100]])
    return {"labels": {"SequenceClassification": torch.tensor([0, 2, 1]), "TokenClassification": marked, "MultipleChoice": torch.tensor([0, 1, 1])}[task]}


def expected_loss(task: str, output: Any) -> Tensor:
    """What transformers computes without an adapter: of the caller's own tokens alone."""
    own = labels(task)
    if task == "QuestionAnswering":
        pairs = [(output.start_logits, own["start_positions"]), (output.end_logits, own["end_positions"])]
        return torch.stack([nn.functional.cross_entropy(logits, wanted) for logits, wanted in pairs]).mean()
    return nn.functional.cross_entropy(output.logits.flatten(0, -2), own["labels"].flatten())


def results(output: Any) -> Tensor:
    return torch.stack([output.start_logits, output.end_logits], -1) if "start_logits" in output else output.logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "method"), covering(((f"{family}For{task}", method) for family, task in HOSTS for method in METHODS), each=1))
def test_a_head_reads_the_callers_own_tokens(kind: str, method: str) -> None:
    family, task = kind.split("For")
    base, inputs = host(family, task), batch(task)
    plain = results(base(**inputs))
    model = get_adalink_model(base, METHODS[method])
    excite(model.active_adapter().double())
    model.eval()
    if method != "adalink" and (family, task) in ENCODER_DECODERS:
        for own in ({}, labels(task)):
            with pytest.raises(ConfigError, match=f"{family}For{task} reads its input ids in its decoder too.* use an adapter without slots"):
                model(**inputs, **own)
        return
    output = model(**inputs, **labels(task))
    found = results(output)
    assert found.shape == plain.shape
    assert not torch.allclose(found, plain)
    assert torch.equal(results(model(**inputs)), found)  # labels say nothing of what the tokens are
    torch.testing.assert_close(output.loss.double(), expected_loss(task, output), rtol=1e-5, atol=1e-5)  # some compute it in float32
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.active_adapter().parameters())
    n_hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in base.modules()]
    if task != "MultipleChoice":
        alone = results(model(**{name: value[1:2, :5] for name, value in inputs.items()}))
        of_own_tokens = found[1:2] if task == "SequenceClassification" else found[1:2, :5]
        torch.testing.assert_close(alone, of_own_tokens, rtol=1e-4, atol=1e-5)  # eager softmax is float32
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in base.modules()] == n_hooks
    assert torch.equal(results(model.unload()(**inputs)), plain)


@pytest.mark.parametrize("method", ["prefix", "prompt", "unipelt"])
def test_a_head_gives_what_it_makes_of_the_states_of_the_bare_model(method: str) -> None:
    base, inputs = host("Bert", "SequenceClassification"), batch("SequenceClassification")
    model = get_adalink_model(base, METHODS[method])
    excite(model.active_adapter().double())
    found, weights = model.eval()(**inputs).logits, model.active_adapter().state_dict()
    model.unload()
    bare = get_adalink_model(base.bert, METHODS[method])
    bare.active_adapter().double().load_state_dict(weights)
    output = bare.eval()(**inputs)
    torch.testing.assert_close(base.classifier(base.bert.pooler(output.last_hidden_state)), found)
    torch.testing.assert_close(base.classifier(output.pooler_output), found)


@pytest.mark.parametrize("method", ["prefix", "prompt", "unipelt"])
@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_a_row_that_is_padded_on_the_left_is_what_it_is_alone(family: str, method: str) -> None:
    model = get_adalink_model(host(family, "SequenceClassification"), METHODS[method])
    excite(model.active_adapter().double())
    inputs = {name: value.flip(1) for name, value in batch("SequenceClassification").items()}
    alone = {name: value[1:2, 2:] for name, value in inputs.items()}
    torch.testing.assert_close(model.eval()(**inputs).logits[1:2], model(**alone).logits, rtol=1e-4, atol=1e-5)  # eager softmax is float32


def test_rows_of_several_adapters_share_a_head() -> None:
    model = AdaptedModel(host("Bert", "SequenceClassification"))
    for name in ("prefix", "prompt", "adalink"):
        excite(model.add_adapter(name, {name: METHODS[name]}).double())
    inputs, names = batch("SequenceClassification"), ["prompt", "__base__", "adalink"]
    together = model.eval()(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        alone = model(**{key: value[[row]] for key, value in inputs.items()}, adapter_names=[name]).logits
        torch.testing.assert_close(together[[row]], alone)


def test_a_label_of_a_token_that_is_only_marked_makes_it_no_answer() -> None:
    """A masked language model, and a gate that reads the prompt alone."""
    torch.manual_seed(0)
    model = get_adalink_model(hf.BertForMaskedLM(CONFIGS["Bert"]()).double(), METHODS["unipelt"])
    excite(model.active_adapter().double())
    inputs, own = batch(""), labels("TokenClassification")
    marked, plain = model.eval()(**inputs, **own), model(**inputs)
    assert torch.equal(marked.logits, plain.logits)
    torch.testing.assert_close(marked.loss, nn.functional.cross_entropy(plain.logits.flatten(0, 1), own["labels"].flatten()))


HEADS = {"Bert": "classifier", "DistilBert": "classifier", "Roberta": "classifier", "GPT2": "score", "Llama": "score"}


@pytest.mark.parametrize("family", HEADS)
def test_a_head_is_trained_saved_and_loaded_with_its_adapter(family: str, tmp_path: Path) -> None:
    base, inputs = host(family, "SequenceClassification"), batch("SequenceClassification")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    plain = base(**inputs).logits
    model = get_adalink_model(base, METHODS["unipelt"], modules_to_save=(HEADS[family],))
    optimizer = torch.optim.AdamW(model.active_adapter().parameters(), lr=0.05)
    start = model.eval()(**inputs, **labels("SequenceClassification")).loss.item()
    for _ in range(8):
        model(**inputs, **labels("SequenceClassification")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model.eval()(**inputs, **labels("SequenceClassification"))
    assert trained.loss < start
    assert model.active_adapter().n_parameters().keys() == {"unipelt", "modules_to_save"}
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, plain)
    model.save_pretrained(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in model.unload().state_dict().items())
    other = host(family, "SequenceClassification")
    with torch.no_grad():
        other.get_submodule(HEADS[family]).apply(lambda module: [parameter.normal_() for parameter in module.parameters(recurse=False)])
    again = AdaptedModel.from_pretrained(other, tmp_path)
    again.active_adapter().double()
    torch.testing.assert_close(again(**inputs).logits, trained.logits, rtol=1e-5, atol=1e-5)  # the edits are float32 there
    stored, own = load_file(tmp_path / WEIGHTS_FILE), again.active_adapter().state_dict()
    assert all(torch.equal(value.double(), own[name]) for name, value in stored.items())
    assert f"| modules_to_save | trained copy of {HEADS[family]} |" in (tmp_path / "README.md").read_text()
    with pytest.raises(CheckpointError, match="was trained on the language model"):  # control: another model below the head
        AdaptedModel.from_pretrained(host(family, "SequenceClassification", seed=1), tmp_path)


def test_each_row_has_the_head_of_its_own_adapter() -> None:
    base, inputs = host("Bert", "SequenceClassification"), batch("SequenceClassification")
    plain, model = base(**inputs).logits, AdaptedModel(base)
    for name, modules in (("one", ("classifier",)), ("two", ("classifier",)), ("none", ())):
        excite(model.add_adapter(name, METHODS["prompt"], modules_to_save=modules).double(), seed=len(model.adapters))
    by_name = {}
    for name in ("one", "two", "none"):
        model.set_adapter(name)
        by_name[name] = model.eval()(**inputs).logits
    assert len({tuple(logits[0].tolist()) for logits in (plain, *by_name.values())}) == 4
    mixed = model(**inputs, adapter_names=["two", "none", "one"]).logits
    torch.testing.assert_close(mixed, torch.stack([by_name["two"][0], by_name["none"][1], by_name["one"][2]]))
    model.delete_adapter("one")
    assert torch.equal(model(**inputs, adapter_names=["two"] * 3).logits, by_name["two"])
    model.delete_adapter("two")
    assert not base.classifier._forward_hooks


def test_a_language_models_head_is_untied_by_its_copy_and_writes_with_beams() -> None:
    torch.manual_seed(0)
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **IDS, tie_word_embeddings=True)).double()
    words = base.model.embed_tokens.weight.clone()
    model = get_adalink_model(base, METHODS["adalink"], modules_to_save=("lm_head",))
    excite(model.active_adapter().double(), 3)
    assert torch.equal(base.model.embed_tokens.weight, words)
    inputs: dict[str, Any] = {name: value.flip(1) for name, value in batch("").items()}
    cached, uncached = (model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False), cached)


def test_a_head_in_lower_precision_has_a_copy_in_float32() -> None:
    model = get_adalink_model(host("Bert", "SequenceClassification").bfloat16(), METHODS["adalink"], modules_to_save=("classifier",))
    assert {parameter.dtype for parameter in model.active_adapter().parameters()} == {torch.float32}
    assert model(**batch("SequenceClassification")).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("score",), "modules_to_save names 'score', and BertForSequenceClassification has no such module: its heads are classifier"),
        ("classifier", r"modules_to_save is the text 'classifier', expected a tuple of names: give \('classifier',\)"),
        (("encoder",), "modules_to_save names bert.encoder, which is where an adapter's methods edit"),
        (("word_embeddings",), "modules_to_save names bert.embeddings.word_embeddings, which is where"),
        (("query",), r"modules_to_save names bert\.encoder\.layer\.0\.attention\.self\.query, which is where"),
    ],
)
def test_modules_that_cannot_be_copied_are_refused(names: Any, message: str) -> None:
    model = AdaptedModel(host("Bert", "SequenceClassification"))
    with pytest.raises(ConfigError, match=message):
        model.add_adapter("x", METHODS["adalink"], modules_to_save=names)
    assert not model.adapters


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_a_classifier_goes_to_peft_and_comes_back(family: str, tmp_path: Path) -> None:
    inputs = batch("SequenceClassification")
    targets = {"Bert": ["query", "value"], "Llama": ["q_proj", "down_proj"]}[family]
    settings = LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=targets)
    theirs: Any = get_peft_model(host(family, "SequenceClassification"), settings).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    expected = theirs.eval()(**inputs).logits
    theirs.save_pretrained(tmp_path / "theirs")
    read = from_peft(tmp_path / "theirs", host(family, "SequenceClassification"))
    assert tuple(read.copies) == (HEADS[family],)
    model = AdaptedModel(host(family, "SequenceClassification"))
    model.add_adapter("lora", read.methods, modules_to_save=tuple(read.copies)).double().load_state_dict(read.state_dict())
    torch.testing.assert_close(model.eval()(**inputs).logits, expected)
    to_peft(model.active_adapter(), model.base, tmp_path / "ours")
    back = PeftModel.from_pretrained(host(family, "SequenceClassification"), tmp_path / "ours").double().eval()
    torch.testing.assert_close(back(**inputs).logits, expected)
    adapter, base = model.active_adapter(), model.unload()
    merge_linears(base, adapter)
    torch.testing.assert_close(base(**inputs).logits, expected)
