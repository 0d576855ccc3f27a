"""Rows of one text or two for a model without an encoder: the ids and token types of the model's own tokenizer, cut where it would cut."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from composed import language
from shared import shared
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from adalink.errors import ConfigError
from adalink.tokens import PAD
from multimodal.batches.collate import collate
from multimodal.batches.tokenize import Row, TextRowEncoder, TextTooLong, longest_first
from multimodal.language import Language
from multimodal.template import Template, Text, TextTemplate, saved_template

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 200}


def sentences() -> list[str]:
    lines = shared("data/stsb/dev.tsv").read_text().splitlines()[1:]
    return [field for line in lines for field in line.split("\t")[7:9]]


def byte_level(processor: str) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(sentences()[:200], trainer)
    if processor == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    else:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B:1 </s>:1", [("<s>", 0), ("</s>", 2)])
    roles = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **roles)


def reader(family: str) -> Language:
    if family in ("bert", "electra"):
        kind = hf.AutoTokenizer if family == "bert" else hf.ElectraTokenizer
        tokenizer: Any = kind.from_pretrained(shared("parts/minilm_l6"))
    else:
        tokenizer = byte_level(family)
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **SIZES}
    made: dict[str, Any] = {
        "bert": lambda: hf.BertModel(hf.BertConfig(**size), add_pooling_layer=False),
        "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**size, type_vocab_size=1), add_pooling_layer=False),
        "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**size, embedding_size=8)),
        "modernbert": lambda: hf.ModernBertModel(hf.ModernBertConfig(**size)),
    }
    return Language(model=made[family]().eval(), tokenizer=tokenizer, name=family)


def pairs() -> list[tuple[str, str]]:
    """200 pairs, many of them longer than 128 tokens, on either side or on both."""
    rng, known = random.Random(0), sentences()
    return [(" ".join(rng.sample(known, rng.choice((1, 1, 2, 5, 12)))), " ".join(rng.sample(known, rng.choice((1, 1, 2, 5, 12))))) for _ in range(200)]


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "modernbert"])
def test_ids_and_token_types_are_those_of_the_tokenizer_itself(family: str) -> None:
    spoken = reader(family)
    encoder = TextRowEncoder(TextTemplate(), spoken, [], 2)
    n_cut = 0
    for first, second in pairs():
        for given in ((first, second), (first,)):
            wanted = spoken.tokenizer(*given, truncation="longest_first", max_length=128)
            row = encoder.row(Text(given[0], None, pair=given[1] if len(given) > 1 else ""))
            assert list(row.ids) == wanted["input_ids"]
            assert list(row.kind) or [0] * len(row.ids) == wanted.get("token_type_ids", [0] * len(row.ids))
            if "token_type_ids" in wanted:
                assert list(row.kind or (0,) * len(row.ids)) == wanted["token_type_ids"]
            whole = len(spoken.tokenizer(*given)["input_ids"])
            assert encoder.excess(Text(given[0], None, pair=given[1] if len(given) > 1 else "")) == max(whole - 128, 0)
            n_cut += whole > 128
    assert 100 < n_cut < 400


def test_the_state_of_a_pair_needs_its_token_types() -> None:
    """The control: without types MiniLM's CLS is another one."""
    spoken = reader("bert")
    real = hf.AutoModel.from_pretrained(shared("parts/minilm_l6"), dtype=torch.float32).eval()
    row = TextRowEncoder(TextTemplate(), spoken, [], 2).row(Text("A man is dancing.", None, pair="A woman sings."))
    assert set(row.kind) == {0, 1}
    batch = collate([row, Row(row.ids[:5], row.domain[:5])], [0, 0], torch.zeros(1, 0, 0), kind="patches", side="left", pad_id=0)
    assert batch.kind is not None
    wanted = real(**spoken.tokenizer("A man is dancing.", "A woman sings.", return_tensors="pt")).last_hidden_state[0, 0]
    both = [real(input_ids=batch.ids[:1], token_type_ids=kind).last_hidden_state[0, 0] for kind in (batch.kind[:1], None)]
    assert torch.allclose(both[0], wanted, atol=1e-5)
    assert not torch.allclose(both[1], wanted, atol=1e-3)
    assert batch.kind[1, batch.domain[1] == PAD].sum() == 0


def test_lengths_are_cut_as_the_library_cuts_them() -> None:
    assert longest_first([100, 20], 60) == [40, 20]
    assert longest_first([100, 90], 61) == [31, 30]
    assert longest_first([20, 100], 60) == [20, 40]
    assert longest_first([100], 60) == [60]
    assert longest_first([10, 20], 60) == [10, 20]


def test_words_of_a_template_stay_whole_where_its_texts_are_cut() -> None:
    template = TextTemplate(prompt="<bos>question: {text} is {pair} answer:", target=" {text}<eos>", max_tokens=12)
    encoder = TextRowEncoder(template, language("llama"), [])
    whole = TextRowEncoder(TextTemplate(**{**vars(template), "max_tokens": 40}), language("llama"), [])
    short, long = Text("a red ball", "yes", pair="red"), Text("a red ball is on a cube is on a ball", "yes", pair="red")
    assert encoder.excess(short) == 0
    assert encoder.row(short) == whole.row(short)
    assert encoder.excess(long) == len(whole.asked(long).ids) - 12
    cut = encoder.row(long)
    asked = encoder.asked(long)
    assert len(asked.ids) == 12
    words = encoder.tokenizer.decode(asked.ids).split()
    assert words[-3:] == ["is", "red", "answer:"]
    assert cut.target == whole.row(long).target  # never a label word
    with pytest.raises(TextTooLong, match=r"the prompt template .* has more tokens than the 8 that a row may have: shorten it"):
        TextRowEncoder(TextTemplate(prompt="{text}" + " ball" * 10, max_tokens=8), language("llama"), []).prompt("a")
    with pytest.raises(ConfigError, match=r"reads a text or a pair of texts, and .* was given: give \(text, second text\)"):
        encoder.prompt(["a", "b", "c"])
    assert encoder.prompt(("a red ball", "red")) == encoder.asked(short)


def test_a_label_that_is_spelled_as_a_special_token_stays_letters() -> None:
    spoken = reader("bert")
    row = TextRowEncoder(TextTemplate(), spoken, [], 2).row(Text("a [SEP] b", None))
    assert row.ids.count(spoken.tokenizer.sep_token_id) == 1
    assert spoken.tokenizer("a [SEP] b")["input_ids"].count(spoken.tokenizer.sep_token_id) == 2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompt": "<image>{text}"}, "has a place for an image, and no encoder would fill it"),
        ({"prompt": "a"}, r"must both hold \{text\}"),
        ({"prompt": "{text} {par}"}, r"has a place \{par\} that nothing fills: it may have \{text\} and \{pair\}"),
        ({"target": "{text} {pair}"}, r"has a place \{pair\} that nothing fills: it may have \{text\}$"),
        ({"max_tokens": 2}, "max_tokens is 2: give 8 or more"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        TextTemplate(**fields)


def test_a_saved_template_is_of_its_kind(tmp_path: Path) -> None:
    template = TextTemplate(prompt="<bos>{text} it was", target=" {text}", max_tokens=40)
    assert saved_template(template.saved()) == template
    other = Template(prompt="<image>{question}")
    assert saved_template(other.saved()) == other
