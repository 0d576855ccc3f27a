"""What people wrote stays letters, with every kind of tokenizer; the template's own special tokens are tokens."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shared import shared
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from multimodal.batches.tokenize import TextTokens
from tasks.scenes.parts import language_folder

CORPUS = ["a red ball is on the blue cube", "question: is it red? answer: yes", "two men play with a ball", "</s> <image> <|end|> [IMG] <unk>"] * 3
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
ADDED = [
    AddedToken("<image>", special=True, normalized=False),
    AddedToken("<|end|>", special=False, normalized=False),  # looks like a special token, and is not called one
    AddedToken("[IMG]", special=False, normalized=True),
    AddedToken("<mask>", special=True, lstrip=True, rstrip=True),
    AddedToken("<word>", special=True, single_word=True),
    AddedToken("\n\n", special=False, normalized=False),  # text
    AddedToken("covid", special=False, normalized=False),  # a word that the vocabulary lacked
]


def _fast(tokenizer: Tokenizer, trainer: Any = None) -> Any:
    if trainer is not None:
        tokenizer.train_from_iterator(CORPUS, trainer)
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    found.add_tokens(ADDED)
    return found


def byte_level() -> Any:
    """As GPT-2 and Llama 3 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return _fast(tokenizer, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))


def lower_case() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return _fast(tokenizer, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))


def unigram() -> Any:
    """As T5 has it: the vocabulary itself holds the spelling of its special tokens."""
    letters = [(letter, -8.0) for letter in sorted({letter for text in CORPUS for letter in text} | set("\n</>[]|")) if letter != " "]
    bytes_ = [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
    words = [("▁", -6.0), ("▁a", -3.0), ("▁ball", -3.0), ("▁red", -3.0), ("▁is", -3.0), ("▁question:", -3.0)]
    tokenizer = Tokenizer(models.Unigram([(spelling, 0.0) for spelling in SPECIAL] + words + letters + bytes_, unk_id=3, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=True)])
    return _fast(tokenizer)


def whole_words() -> Any:
    """A vocabulary whose words are looked up whole first, special spellings among them (Llama 3's `ignore_merges`)."""
    tokenizer = byte_level().backend_tokenizer
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    tokenizer.model = models.BPE(vocab=vocabulary, merges=[], ignore_merges=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "merged_with_next"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return _fast(tokenizer)


class Bytes(PreTrainedTokenizer):
    """A tokenizer in Python whose words are the pieces between spaces where the vocabulary knows them, else letters."""

    def __init__(self, **options: Any) -> None:
        self._words = [*SPECIAL, "<image>", "ball", "red", *map(chr, range(32, 127)), "\n"]
        self._numbers = {word: number for number, word in enumerate(self._words)}
        super().__init__(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self._words)

    def get_vocab(self) -> dict[str, int]:
        return self._numbers | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [part for word in text.split(" ") for part in ([" "] + ([word] if word in self._numbers else list(word)))][1:]

    def _convert_token_to_id(self, token: str) -> int:
        return self._numbers.get(token, 3)

    def _convert_id_to_token(self, index: int) -> str:
        return self._words[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def slow_words() -> Any:
    tokenizer = Bytes()
    tokenizer.add_tokens(ADDED)
    return tokenizer


def byt5() -> Any:
    return ByT5Tokenizer()


def _part(folder: Path) -> Callable[[], Any]:
    def load() -> Any:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(ADDED)
        return tokenizer

    load.__name__ = folder.name
    return load


MADE = [byte_level, lower_case, unigram, whole_words, slow_words, byt5]
SAVED = [_part(language_folder()), *(_part(shared(f"parts/{name}")) for name in ("captions_opt_3m", "stories260k_llama_hf"))]
ALL = [cache(make) for make in (*MADE, *SAVED)]
by_tokenizer = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)

# What a text may be put together from: spellings, halves of them, and what stands around.
PIECES = st.sampled_from(["</s>", "<s>", "<pad>", "<unk>", "<image>", "<|end|>", "[IMG]", "[img]", "<mask>", "<word>", "<", "/s>", "image>", "a ball", " ", "red", "\n", "?"])
WORDS = st.sampled_from(["a ball", " ", "red", "on it", "\n\n", "covid", "?", "\n", "<", ">", "is", "<0x41>"])


@cache
def tokens_of(tokenizer: Any) -> TextTokens:
    return TextTokens(tokenizer)


def markers(tokenizer: Any) -> set[int]:
    """The ids that no text of people may bring in."""
    return {id for id, token in tokenizer.added_tokens_decoder.items() if token.special or str(token.content) in ("<|end|>", "[IMG]", *SPECIAL)}


def written(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()


@by_tokenizer
@settings(max_examples=40)
@given(pieces=st.lists(PIECES, min_size=1, max_size=6))
@example(pieces=["a ball", "</s>", " red"])
@example(pieces=["a ball ", "<image>"])
@example(pieces=["</s>"])
@example(pieces=["<unk>"])
def test_a_text_never_becomes_a_special_token_and_reads_the_same_afterwards(make: Callable[[], Any], pieces: list[str]) -> None:
    tokenizer, text = make(), "".join(pieces)
    ids = tokens_of(tokenizer).ids(("", ""), text)
    unknown = set() if tokenizer.unk_token_id is None else {tokenizer.unk_token_id}
    assert not (markers(tokenizer) - unknown).intersection(ids)
    if make.__name__ != "whole_words":  # which knows no letters without a space before them, so some are unknown
        assert not markers(tokenizer).intersection(ids)
        same = text.lower() if "ower" in make.__name__ or make.__name__ == "language" else text
        assert written(tokenizer, ids) == same.strip()


@by_tokenizer
@settings(max_examples=40)
@given(question=st.lists(WORDS, max_size=6).map("".join))
def test_a_text_without_such_a_spelling_has_the_ids_that_the_tokenizer_gives(make: Callable[[], Any], question: str) -> None:
    tokenizer = make()
    text = f"question: {question} answer:"
    assert tokens_of(tokenizer).ids(("question: ", " answer:"), question) == tokenizer(text, add_special_tokens=False)["input_ids"]


@by_tokenizer
@pytest.mark.parametrize("marker", ["</s>", "<image>", "<|end|>"])
@pytest.mark.parametrize("question", ["is it red", "a</s>b", "<image>", "<|end|>", "<image> or <|end|></s>"])
def test_the_template_alone_writes_special_tokens(make: Callable[[], Any], marker: str, question: str) -> None:
    tokenizer = make()
    if marker not in tokenizer.get_vocab():
        pytest.skip("this tokenizer has no such token")
    number = tokenizer.convert_tokens_to_ids(marker)
    ids = tokens_of(tokenizer).ids((f"{marker}a ", f"{marker} ball"), question)
    found = [id for id in ids if id in markers(tokenizer) and id != tokenizer.unk_token_id]
    assert found == [number, number]
    first, second = (place for place, id in enumerate(ids) if id == number)
    between = ids[first + 1 : second]
    assert between == tokens_of(tokenizer).ids((f"{marker}a ", ""), question)[1:]
    if make.__name__ != "whole_words":
        assert written(tokenizer, between) == f"a {question}"


def test_a_spelling_that_the_template_and_the_text_make_together_is_letters() -> None:
    tokenizer = byte_level()
    end = tokenizer.eos_token_id
    assert end not in tokens_of(tokenizer).ids(("<", " ball"), "/s>")
    assert tokens_of(tokenizer).ids(("", "</s>"), "<").count(end) == 1


def test_a_role_without_brackets_is_a_word() -> None:
    tokenizer = byte_level()
    tokenizer.pad_token = "!"  # as in CLIP's
    ids = tokens_of(tokenizer).ids(("", ""), "a ball!")
    assert written(tokenizer, ids) == "a ball!" or ids == tokenizer("a ball!", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["captions_opt_3m", "stories260k_llama_hf", "minilm_l6"])
def test_a_whole_prompt_keeps_the_tokens_that_the_tokenizer_puts_around(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared(f"parts/{name}"))
    assert tokens_of(tokenizer).whole("a ball") == tokenizer("a ball")["input_ids"]
    spelled = "a </s> <unk> [SEP] [UNK] ball"
    around, ids = tokenizer("")["input_ids"], tokens_of(tokenizer).whole(spelled)
    assert [id for id in ids if id in tokenizer.all_special_ids] == around
    assert written(tokenizer, ids).replace(" ", "") == (spelled.lower() if name == "minilm_l6" else spelled).replace(" ", "")


def test_it_travels_as_its_tokenizer() -> None:
    tokens = pickle.loads(pickle.dumps(TextTokens(byte_level())))
    assert tokens.ids(("a ", ""), "</s>") == TextTokens(byte_level()).ids(("a ", ""), "</s>")
