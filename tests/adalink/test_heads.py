"""Models with a head that classifies: adapters with and without slots, with labels and without, and heads that are trained with the adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tiny import excite
from torch import Tensor, nn

from adalink import AdaLink, AdaptedModel, Method, Prefix, Prompt, UniPELT, get_adalink_model
from adalink.errors import ConfigError

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, **IDS}
CONFIGS: dict[str, Any] = {
    "Bert": lambda: hf.BertConfig(**SIZES),
    "Roberta": lambda: hf.RobertaConfig(**SIZES, pad_token_id=0),
    "Electra": lambda: hf.ElectraConfig(**SIZES, embedding_size=16),
    "DistilBert": lambda: hf.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=40),
    "Albert": lambda: hf.AlbertConfig(**SIZES, embedding_size=16),
    "GPT2": lambda: hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=40, **IDS),
    "Llama": lambda: hf.LlamaConfig(**SIZES, **IDS),
    "T5": lambda: hf.T5Config(**T5),
    "Bart": lambda: hf.BartConfig(vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                                  encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40, decoder_start_token_id=2, **IDS),
}  # fmt: skip
TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
METHODS: dict[str, Method] = {
    "adalink": AdaLink(rank=4, modalities=("text",)),
    "unipelt": UniPELT(variant="APL", prefix_length=3, prefix_hidden=8, prefix_init_std=0.5),
    "prefix": Prefix(length=3, form="table", init_std=0.5),
    "prompt": Prompt(length=3, init_std=0.5),
}
HOSTS = [(family, task) for family in CONFIGS for task in TASKS if hasattr(hf, f"{family}For{task}")]
ENCODER_DECODERS = [("T5", "SequenceClassification"), ("T5", "QuestionAnswering"), ("Bart", "SequenceClassification"), ("Bart", "QuestionAnswering")]


def host(family: str, task: str, seed: int = 0) -> Any:
    """A float64 model with a random head for three classes (two for the ends of an answer), its weights large enough for edits to show."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.num_labels = 2 if task == "QuestionAnswering" else 3
    config.problem_type = "single_label_classification" if task == "SequenceClassification" else None
    model = getattr(hf, f"{family}For{task}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "task"), HOSTS)
def test_a_head_reads_the_callers_own_tokens(family: str, task: str, method: str) -> None:
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
