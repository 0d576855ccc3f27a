"""Rows, worked by hand for a decoder-only and an encoder-decoder model."""

from __future__ import annotations

import pickle

import pytest
from composed import ID, N_POSITIONS, language
from hypothesis import given
from hypothesis import strategies as st

from adalink import ANSWER, IMAGE, PROMPT, TEXT, Slots
from adalink.errors import ConfigError
from multimodal.batches.tokenize import RowEncoder, TextTooLong
from multimodal.template import Template, Text

VQA = Template(prompt="<image><bos>question: {question} answer:", target=" {text}<eos>")
OPT, T5 = language("opt"), language("t5")
PAD, BOS, EOS = 0, 1, 2


def ids(text: str) -> tuple[int, ...]:
    return tuple(ID[word] for word in text.split())


def test_a_row_of_a_decoder_only_model_by_hand() -> None:
    row = RowEncoder(VQA, OPT, [Slots(IMAGE, 3)]).row(Text("is it red ?", "a ball"))
    #            three image slots  the prompt                                        the answer without its last token
    assert row.ids == (PAD, PAD, PAD, BOS, *ids("question: is it red ? answer:"), *ids("a ball"))
    assert row.domain == (IMAGE, IMAGE, IMAGE, *([TEXT] * 7), ANSWER, ANSWER)
    # The prompt's last token, at 9, predicts the first of the answer; the last that is read, at 11, predicts the end.
    assert row.source == (9, 10, 11)
    assert row.target == (*ids("a ball"), EOS)
    assert row.decoder_ids == ()


def test_a_row_of_an_encoder_decoder_model_by_hand() -> None:
    row = RowEncoder(VQA, T5, [Slots(IMAGE, 3)]).row(Text("is it red ?", "a ball"))
    assert row.ids == (PAD, PAD, PAD, *ids("question: is it red ? answer:"))  # it has no start token
    assert row.domain == (IMAGE, IMAGE, IMAGE, *([TEXT] * 6))
    assert row.decoder_ids == (0, *ids("a ball"))  # the start token, then the target shifted by one
    assert row.source == (0, 1, 2)
    assert row.target == (*ids("a ball"), EOS)


def test_a_target_of_one_token_reads_nothing_of_it() -> None:
    template = Template(prompt="<image><bos>", target="{text}")
    row = RowEncoder(template, OPT, [Slots(IMAGE, 2)]).row(Text("", "yes"))
    assert (row.ids, row.domain) == ((PAD, PAD, BOS), (IMAGE, IMAGE, TEXT))
    assert (row.source, row.target) == ((2,), ids("yes"))


def test_slots_of_a_method_come_first_and_the_picture_where_the_template_says() -> None:
    template = Template(prompt="<bos>question: {question}<image>answer:", target="{text}<eos>")
    row = RowEncoder(template, OPT, [Slots(IMAGE, 2), Slots(PROMPT, 3)]).prompt("is it ?")
    assert row.domain == (PROMPT, PROMPT, PROMPT, *([TEXT] * 5), IMAGE, IMAGE, TEXT)
    assert row.ids == (PAD, PAD, PAD, BOS, *ids("question: is it ?"), PAD, PAD, *ids("answer:"))


@pytest.mark.parametrize("model", [OPT, T5], ids=["opt", "t5"])
@pytest.mark.parametrize("text", ["<image>", "<bos>", "<eos>", "</s>", "<pad>", "yes </s> no", "<s> </s>"])
def test_a_text_that_is_a_marker_or_a_special_token_stays_text(model: object, text: str) -> None:
    template = Template(prompt="<image>{question}<bos>", target="{text}<eos>")
    row = RowEncoder(template, model, [Slots(IMAGE, 2)]).row(Text(text, text))  # type: ignore[arg-type]
    n_text = row.domain.count(TEXT) - (model is OPT)
    assert row.domain.count(IMAGE) == 2
    assert n_text >= 1
    special = {PAD, EOS} if model is T5 else {PAD, BOS, EOS}  # T5 has no start token, so <s> is a word of it
    assert not special.intersection(row.ids[2 : 2 + n_text])
    assert not special.intersection(row.target[:-1])
    assert row.target[-1] == EOS


def test_without_a_bridge_the_picture_takes_no_place() -> None:
    assert IMAGE not in RowEncoder(VQA, OPT, []).prompt("is it ?").domain


@pytest.mark.parametrize("model", [OPT, T5], ids=["opt", "t5"])
@given(question=st.lists(st.sampled_from(sorted(ID)[:8])).map(" ".join), target=st.lists(st.sampled_from(["yes", "no", "ball"])).map(" ".join))
def test_what_is_learnt_begins_with_what_is_asked(model: object, question: str, target: str) -> None:
    encoder = RowEncoder(VQA, model, [Slots(IMAGE, 2), Slots(PROMPT, 1)])  # type: ignore[arg-type]
    asked, learned = encoder.prompt(question), encoder.row(Text(question, target))
    n = len(asked.ids)
    assert (learned.ids[:n], learned.domain[:n]) == (asked.ids, asked.domain)
    assert encoder.row(Text(question, None)) == asked
    assert learned.target == (*ids(target), EOS)
    read = learned.decoder_ids if model is T5 else learned.ids
    assert [read[s + 1] for s in learned.source[:-1]] == list(learned.target[:-1])  # each source is followed by its target
    assert learned.source[-1] == len(read) - 1


def test_a_text_beyond_the_positions_is_refused_and_one_that_fits_is_not() -> None:
    encoder = RowEncoder(Template(prompt="<image><bos>", target="{text}<eos>"), OPT, [Slots(IMAGE, 36)])
    room = N_POSITIONS - 36 - 2  # start and end
    assert len(encoder.row(Text("", "yes " * room)).target) == room + 1
    message = f"a text needs {N_POSITIONS + 1} tokens with its image, and the language model has {N_POSITIONS} positions: shorten it"
    with pytest.raises(TextTooLong, match=message):
        encoder.row(Text("", "yes " * (room + 1)))
    with pytest.raises(TextTooLong, match="positions: shorten it"):
        RowEncoder(VQA, OPT, []).prompt("yes " * N_POSITIONS)


def test_t5_has_no_last_position() -> None:
    assert len(RowEncoder(VQA, T5, []).row(Text("is " * 600, "yes " * 600)).target) == 601


def test_a_template_that_gives_no_token_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompt template '<image><bos>' gives no token at all with this model: add a word or a bridge"):
        RowEncoder(Template(prompt="<image><bos>"), T5, []).prompt("")


def test_an_encoder_decoder_model_without_a_start_is_refused() -> None:
    model = language("t5")
    model.model.config.decoder_start_token_id = None
    with pytest.raises(ConfigError, match="names no decoder_start_token_id in its config: add it there"):
        RowEncoder(VQA, model, [])


def test_the_encoder_travels_to_worker_processes_without_weights() -> None:
    encoder = RowEncoder(VQA, OPT, [Slots(IMAGE, 3)])
    data = pickle.dumps(encoder)
    assert len(data) < 50_000
    assert pickle.loads(data).row(Text("is it ?", "no")) == encoder.row(Text("is it ?", "no"))
