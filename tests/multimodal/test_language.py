from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import shared
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BloomConfig,
    Gemma3Config,
    GPT2Config,
    LEDConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
    RobertaModel,
    T5Config,
    TrOCRConfig,
    ViTConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from adalink.errors import ConfigError, DataError
from multimodal.batches.tokenize import RowEncoder, TextTooLong
from multimodal.language import Language, load_language
from multimodal.template import Template, Text

VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "a", "red", "circle", "?"]
IDS = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL, **IDS),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2, **IDS),
    "opt": OPTConfig(hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16, **{**IDS, "pad_token_id": 0}),
    "gpt2": GPT2Config(n_embd=16, n_layer=1, n_head=2, **IDS),
    "t5": T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, **{**IDS, "bos_token_id": None, "pad_token_id": 0}),
}


def save(folder: Path, config: Any, **special: str) -> Any:
    """A model of `config`, and a tokenizer of eight words with the special tokens named; the model as saved."""
    families = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    model = families[type(config)](config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder, **special)
    return model


def save_tokenizer(folder: Path, words: list[str] = VOCABULARY, **special: str) -> None:
    words_only = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    words_only.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words_only, unk_token="<unk>", **special).save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_frozen_and_computes_the_same(tmp_path: Path, family: str) -> None:
    saved = save(tmp_path, FAMILIES[family], eos_token="</s>")
    language = load_language(tmp_path)
    assert language.name == str(tmp_path)
    assert not language.model.training
    assert not any(parameter.requires_grad for parameter in language.model.parameters())
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        found, expected = language.model(input_ids=ids, labels=ids), saved(input_ids=ids, labels=ids)
    assert torch.equal(found.logits, expected.logits)
    assert language.model.config.is_encoder_decoder == (family == "t5")


@pytest.mark.parametrize(
    "family, special, expected",
    [
        ("opt", {"eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"}, (1, 2, 0)),  # all in the tokenizer
        ("llama", {"eos_token": "</s>", "bos_token": "<s>"}, (1, 2, 2)),  # no pad: the end token
        ("llama", {}, (1, 2, 2)),  # from the model's configuration
        ("qwen2", {"eos_token": "?"}, (1, 7, 7)),  # the tokenizer's own end counts
        ("t5", {"eos_token": "</s>", "pad_token": "<pad>"}, (None, 2, 0)),  # a model without a start token
    ],
)  # fmt: skip
def test_start_end_and_pad_are_settled(tmp_path: Path, family: str, special: dict[str, str], expected: tuple[int | None, int, int]) -> None:
    save(tmp_path, FAMILIES[family], **special)
    language = load_language(tmp_path)
    tokenizer = language.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == expected
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(tmp_path))  # none was added
    assert language.model.config.pad_token_id == language.model.generation_config.pad_token_id == expected[2]


def test_the_first_of_several_end_tokens_ends_a_text(tmp_path: Path) -> None:
    save(tmp_path, FAMILIES["llama"])
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [7, 2]}))
    language = load_language(tmp_path)
    assert language.tokenizer.eos_token_id == 7
    assert language.end_ids == (7, 2)


def test_all_end_tokens_that_a_model_names_end_a_text(tmp_path: Path) -> None:
    save(tmp_path, FAMILIES["llama"], eos_token="</s>")
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [7, 2, 99]}))
    assert load_language(tmp_path).end_ids == (2, 7)  # the tokenizer's own first; 99 is no row of the embedding


NESTED: dict[str, Any] = {"vision_config": {**SMALL, "image_size": 8, "patch_size": 4}, "image_token_index": 7}


def test_limits_and_ids_are_read_where_a_config_of_several_parts_keeps_them(tmp_path: Path) -> None:
    text = {**SMALL, **IDS, "eos_token_id": [2, 5], "max_position_embeddings": 12, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 8, "layer_types": ["full_attention"] * SMALL["num_hidden_layers"]}
    save(tmp_path, Gemma3Config(text_config=text, **NESTED, eos_token_id=None), pad_token="</s>")
    language = load_language(tmp_path)
    assert not hasattr(language.model.config, "max_position_embeddings")
    assert (language.max_positions, language.end_ids) == (12, (2, 5))
    assert (language.tokenizer.bos_token_id, language.tokenizer.eos_token_id) == (1, 2)
    encoder = RowEncoder(Template(prompt="<image><bos>{question}", target="{text}<eos>"), language, [])
    encoder.row(Text("a " * 5, "a " * 5))
    with pytest.raises(TextTooLong, match="a text needs 13 tokens with its image, and the language model has 12 positions: shorten it"):
        encoder.row(Text("a " * 6, "a " * 5))


def test_limits_of_both_sides_of_an_encoder_decoder_are_kept(tmp_path: Path) -> None:
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = LEDConfig(
        vocab_size=len(VOCABULARY), d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, **sizes, max_encoder_position_embeddings=16, max_decoder_position_embeddings=6,
        attention_window=2, decoder_start_token_id=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    save(tmp_path, config, eos_token="</s>")
    language = load_language(tmp_path)
    assert (language.max_positions, language.max_written) == (16, 6)
    encoder = RowEncoder(Template(prompt="<image>{question}", target="{text}<eos>"), language, [])
    encoder.row(Text("a " * 16, "a " * 5))
    for question, answer in (("a " * 17, "a"), ("a", "a " * 6)):
        with pytest.raises(TextTooLong, match="positions: shorten it"):
            encoder.row(Text(question, answer))


@pytest.mark.parametrize(("config", "limit"), [
    (OPTConfig(hidden_size=8, word_embed_proj_dim=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=10, max_position_embeddings=9), 9),
    (RobertaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=10, max_position_embeddings=9, is_decoder=True), 7),
    (BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=10), None),
])  # fmt: skip
def test_learned_positions_are_those_that_words_can_have(config: Any, limit: int | None) -> None:
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    assert Language(model=model, tokenizer=None, name="it").max_positions == limit
    if limit:
        model(torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            model(torch.full((1, limit + 1), 5))


def test_a_pad_token_outside_the_embedding_is_not_used(tmp_path: Path) -> None:
    save(tmp_path, FAMILIES["llama"], eos_token="</s>", pad_token="<added>")
    assert load_language(tmp_path).tokenizer.pad_token_id == 2


def test_the_dtype_is_that_of_the_files_or_the_one_asked_for(tmp_path: Path) -> None:
    model = save(tmp_path, FAMILIES["llama"])
    assert load_language(tmp_path).model.dtype == torch.float32
    assert load_language(tmp_path, dtype=torch.float64).model.dtype == torch.float64
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_language(tmp_path).model.dtype == torch.bfloat16


def test_fast_attention_is_the_default(tmp_path: Path) -> None:
    save(tmp_path, FAMILIES["llama"])
    assert load_language(tmp_path).model.config._attn_implementation == "sdpa"


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, FAMILIES["llama"])
    capfd.readouterr()
    load_language(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part, ids", [("captions_opt_3m", (2, 2, 1)), ("stories260k_llama_hf", (1, 2, 2))])
def test_real_models_write(part: str, ids: tuple[int, int, int]) -> None:
    language = load_language(shared(f"parts/{part}"))
    tokenizer = language.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == ids
    prompt = tokenizer("a man", return_tensors="pt").input_ids
    written = language.model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert written.shape[1] <= prompt.shape[1] + 4
    assert tokenizer.decode(written[0, prompt.shape[1] :]).strip()


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is of model type 'vit', expected one that writes text; give a local folder"):
        load_language(tmp_path)


def test_an_empty_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot load the language model '.*': .*config\.json.*; give a local folder in transformers format") as caught:
        load_language(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such/model", "no-such/model@v1", "gpt-17"])
def test_an_unreachable_hub_is_one_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot load the language model '.*': .*; give a local folder") as caught:
        load_language(name)
    assert "\n" not in str(caught.value)


def test_a_path_to_nothing_is_called_a_path() -> None:
    with pytest.raises(ConfigError, match=r"'./absent' should be a folder with a model's files, found nothing there; check the path"):
        load_language("./absent")


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    save(tmp_path, FAMILIES["gpt2"])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot load the language model '.*': .*no file named model.safetensors.*; see that the folder holds"):
        load_language(tmp_path)


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    for family in FAMILIES:
        folder = tmp_path / family
        save(folder, FAMILIES[family])
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        with pytest.raises(ConfigError, match=r"tokenizer of '.*(: Couldn't .*|knows no words, only \d+ special tokens); put the model's tokenizer"):
            load_language(folder)


def test_truncated_weights_are_a_damaged_file(tmp_path: Path) -> None:
    save(tmp_path, FAMILIES["opt"])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"the weights of the language model '.*' cannot be read: .*; fetch the files again"):
        load_language(tmp_path)


def test_missing_weights_are_counted_and_named(tmp_path: Path) -> None:
    save(tmp_path / "small", FAMILIES["llama"])
    deeper = LlamaConfig(**{**SMALL, "num_hidden_layers": 2}, **IDS)
    save(tmp_path / "deep", deeper)
    shutil.copy(tmp_path / "small" / "model.safetensors", tmp_path / "deep" / "model.safetensors")
    with pytest.raises(DataError, match=r"are incomplete: 9 tensors are missing, among them model\.layers\.1\..*; fetch the files again"):
        load_language(tmp_path / "deep")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, FAMILIES["llama"])
    save_tokenizer(tmp_path, [*VOCABULARY, "more"])
    with pytest.raises(ConfigError, match=r"the tokenizer of '.*' knows 9 tokens, expected at most 8, the rows of the model's embedding"):
        load_language(tmp_path)


def test_a_model_without_an_end_token_is_refused(tmp_path: Path) -> None:
    save(tmp_path, LlamaConfig(**SMALL, **{**IDS, "eos_token_id": None}))
    with pytest.raises(ConfigError, match=r"has no end token in its tokenizer, config.json or generation_config.json; set eos_token_id"):
        load_language(tmp_path)


def test_an_encoder_decoder_that_reads_no_text_is_refused(tmp_path: Path) -> None:
    TrOCRConfig(is_encoder_decoder=True).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is of model type 'trocr', expected one that writes text"):
        load_language(tmp_path)


def test_an_encoder_is_no_language_model_that_writes(tmp_path: Path) -> None:
    BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is of model type 'bert', expected one that writes text"):
        load_language(tmp_path)


MASKED = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "pad_token_id": 0}


def test_an_encoder_only_model_is_read_without_a_head_or_pooler(tmp_path: Path) -> None:
    for folder, kind in ((tmp_path / "words", BertForMaskedLM), (tmp_path / "bare", BertModel)):
        saved = kind(BertConfig(**MASKED)).eval()
        saved.save_pretrained(folder)
        save_tokenizer(folder, cls_token="<s>", sep_token="</s>", pad_token="<pad>")
        language = load_language(folder, use="read")
        assert (type(language.model), language.model.pooler) == (BertModel, None)
        stack = saved.bert if kind is BertForMaskedLM else saved
        ids = torch.tensor([[1, 4, 5, 2]])
        assert torch.equal(language.model(ids).last_hidden_state, stack(ids).last_hidden_state)
        assert (language.tokenizer.bos_token_id, language.tokenizer.eos_token_id, language.tokenizer.pad_token_id) == (1, 2, 0)
        assert language.first_position == 0


def test_positions_of_roberta_start_after_its_padding_row(tmp_path: Path) -> None:
    RobertaModel(RobertaConfig(**{**MASKED, "pad_token_id": 3}, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    language = load_language(tmp_path, use="read")
    assert language.first_position == 4
    ids = torch.tensor([[1, 4, 5, 2]])
    assert torch.equal(language.model(ids, position_ids=torch.arange(4, 8)[None]).last_hidden_state, language.model(ids).last_hidden_state)


def test_a_model_that_writes_can_be_read_too_but_for_an_encoder_decoder(tmp_path: Path) -> None:
    save(tmp_path / "opt", FAMILIES["opt"], eos_token="</s>")
    assert type(load_language(tmp_path / "opt", use="read").model) is type(load_language(tmp_path / "opt").model)
    save(tmp_path / "t5", FAMILIES["t5"], eos_token="</s>")
    with pytest.raises(ConfigError, match=r"is of model type 't5', which is an encoder-decoder, and a head chooses an answer from one stack: give an encoder-"):
        load_language(tmp_path / "t5", use="read")
