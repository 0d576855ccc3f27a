"""A running batch: rows that come and go between two tokens are written as each is alone."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from composed import compose, excite
from image_rows import METHODS, NOT_SHARED, alone, asked, tokens_read
from shared import covering

from adalink.attachment.recompute import may_share_prompts
from multimodal.generation.decoding import AT_ONCE, Decoding, may_decode, prefill, tokens_of
from multimodal.generation.generate import GenerationSettings
from multimodal.model import VisionLanguageModel

N_NEW = 7


def written(model: VisionLanguageModel, arrivals: dict[int, tuple[list[str], list[int], list[int]]], gone: dict[int, int]) -> list[str]:
    """The texts of rows that come before some steps; after step `gone[i]` row i is let go, whether or not it has ended."""
    decoding, end = Decoding(model.language, model.adapted.attachment), model.language.tokenizer.eos_token_id
    texts: list[list[int]] = []
    rows: list[int] = []
    newest = torch.empty(0, dtype=torch.int64)
    for step in range(30):
        if rows:
            newest = decoding.step(newest).argmax(-1)
            for row, token in zip(rows, newest.tolist(), strict=True):
                texts[row].append(token)
        if step in arrivals:
            names, about, which = arrivals[step]
            batch = asked(model, names, about, which)
            token_map = model.token_map(batch, names)
            chosen = decoding.join(batch, token_map, may_share=may_share_prompts(model.adapted.attachment, token_map)).argmax(-1)
            rows += range(len(texts), len(texts) + len(names))
            texts += [[token] for token in chosen.tolist()]
            newest = torch.cat([newest, chosen])
        left = [i for i, row in enumerate(rows) if texts[row][-1] != end and len(texts[row]) < N_NEW and gone.get(row, 99) > step]
        if len(left) < len(rows):
            decoding.keep(left)
            rows, newest = [rows[i] for i in left], newest[left]
    assert not rows
    return [text.strip() for text in model.language.tokenizer.batch_decode(texts, skip_special_tokens=True)]


@pytest.mark.parametrize(("method", "family"), covering(product((*METHODS, *NOT_SHARED), ("opt", "llama")), each=1))
def test_rows_that_come_and_go_are_written_as_each_is_alone(method: str, family: str) -> None:
    model = compose(family)
    excite(model.add_adapter("one", {**METHODS, **NOT_SHARED}[method]).double())
    excite(model.add_adapter("two", METHODS["adalink"]).double(), 2)
    excite(model.add_adapter("three", NOT_SHARED["gated"]).double(), 3)
    arrivals = {
        0: (["two", "one", "two"], [0, 0, 1], [1, 0, 3]),
        2: (["one", "one"], [0, 0], [1, 2]),
        3: (["three"], [1], [2]),
        16: (["one"], [1], [4]),  # after all others have ended
    }
    with torch.no_grad():
        texts = written(model, arrivals, {1: 4})
    together = [tuple(values[i] for values in rows) for rows in arrivals.values() for i in range(len(rows[0]))]
    names, about, which = (list(values) for values in zip(*together, strict=True))
    expected = alone(model, names, about, which, GenerationSettings(max_new_tokens=N_NEW))
    assert expected[1].startswith(texts[1])  # the row that was let go
    assert [text for i, text in enumerate(texts) if i != 1] == [text for i, text in enumerate(expected) if i != 1]
    assert len(set(expected)) > 1


@pytest.mark.parametrize(("method", "family"), covering(product(METHODS, ("opt", "gpt2", "llama")), each=1))
def test_a_prompt_that_begins_like_a_known_one_is_read_from_there_on(method: str, family: str) -> None:
    model = compose(family)
    excite(model.add_adapter("one", METHODS[method]).double())
    excite(model.add_adapter("two", METHODS["adalink"]).double(), 2)
    names, about = ["one", "two", "one"], [0, 0, 1]
    before, batch = asked(model, names, about, [1, 0, 2]), asked(model, names, about, [2, 1, 2])  # the last is asked once more
    new, after = Decoding(model.language, model.adapted.attachment), Decoding(model.language, model.adapted.attachment)
    with torch.no_grad():
        after.join(before, model.token_map(before, names), may_share=False)
        known = after.prompts(before, range(3))
        n_alike = [prompt.n_alike(tokens) for prompt, tokens in zip(known, tokens_of(batch.ids, batch.domain), strict=True)]
        lengths = batch.attention_mask.sum(1).tolist()
        assert n_alike[2] == lengths[2] - 1
        n_last = max(length - n for length, n in zip(lengths, n_alike, strict=True))
        assert n_last < min(lengths)
        wanted = new.join(batch, model.token_map(batch, names), may_share=False)
        after.keep([])
        with tokens_read(model) as calls:
            found = after.join_known(batch, model.token_map(batch, names), known, n_last)
        assert calls == [len(names) * n_last]
        for _ in range(3):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
            chosen = wanted.argmax(-1)
            found, wanted = after.step(chosen), new.step(chosen)


def test_columns_that_only_one_row_had_go_with_it() -> None:
    model = compose("llama")
    excite(model.add_adapter("one", METHODS["adalink"]).double())
    decoding = Decoding(model.language, model.adapted.attachment)
    batch = asked(model, ["one"] * 2, [0, 1], [1, 2])  # a long question and a short one
    with torch.no_grad():
        chosen = decoding.join(batch, model.token_map(batch), may_share=True).argmax(-1)
        longest = decoding._cache.get_seq_length()
        decoding.keep([1])
        decoding.step(chosen[[1]])
    assert longest == len(model.row_encoder().prompt("is it a big red ball ?").ids)
    assert decoding._cache.get_seq_length() == len(model.row_encoder().prompt("is it ?").ids) + 1


def test_an_encoder_decoder_model_and_a_slot_without_a_cache_are_not_decoded_row_by_row() -> None:
    for family, method in (("t5", METHODS["adalink"]), ("deep_opt", NOT_SHARED["epalm_late"])):
        model = compose(family)
        model.add_adapter("one", method)
        model.add_adapter("two", METHODS["prompt"])
        maps = [model.token_map(asked(model, [name], [0], [0]), [name]) for name in ("one", "two")]
        decoded = [may_decode(model.language.model, model.adapted.attachment, token_map) for token_map in maps]
        assert decoded == [False, family == "deep_opt"]


@pytest.mark.parametrize(("method", "family"), covering(product(METHODS, ("opt", "llama")), each=1, shift=1))
def test_a_prompt_that_is_read_in_pieces_is_what_it_is_read_whole(method: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compose(family)
    excite(model.add_adapter("one", METHODS[method]).double())
    excite(model.add_adapter("two", METHODS["adalink"]).double(), 2)
    names, about, which = ["two", "one", "two", "one"], [0, 0, 1, 1], [1, 0, 3, 2]
    batch = asked(model, names, about, which)
    token_map, attachment = model.token_map(batch, names), model.adapted.attachment
    assert may_share_prompts(attachment, token_map)
    found = []
    for at_once in (2**25, 600, 1):
        monkeypatch.setattr("multimodal.generation.decoding.AT_ONCE", at_once)
        sizes: list[int] = []
        count = model.language.model.register_forward_pre_hook(lambda _, __, given, sizes=sizes: sizes.append(given["input_ids"].numel()), with_kwargs=True)
        with torch.no_grad():
            cache, scores = prefill(model.language, attachment, batch, token_map, n_left=0, may_share=True)
        count.remove()
        found.append((scores, [(layer.keys, layer.values) for layer in cache.layers], sizes))
    assert max(found[2][2]) <= 4  # one token of each row
    assert len(found[0][2]) < len(found[1][2]) < len(found[2][2])
    real = batch.attention_mask.bool()
    for scores, states, _ in found[1:]:
        # float64, but for the rounding of transformers' softmax, which is of float32 in some models.
        torch.testing.assert_close(scores, found[0][0], rtol=1e-4, atol=1e-4)
        for layer, other in zip(states, found[0][1], strict=True):
            for one, two in zip(layer, other, strict=True):
                torch.testing.assert_close(one.transpose(1, 2)[real], two.transpose(1, 2)[real], rtol=1e-4, atol=1e-4)


def test_what_a_call_holds_does_not_grow_with_the_square_of_a_long_prompt() -> None:
    for rows, length in ((1, 100), (8, 268), (32, 268), (8, 8063), (32, 32_768), (1, 131_072)):
        size = max(AT_ONCE // (rows * length), 1)
        assert rows * size * length <= max(AT_ONCE, rows * length)
        assert size >= length or rows * length > 8000  # prompts of the usual lengths are read in one call
