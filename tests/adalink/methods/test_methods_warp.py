"""WARP on plain models: what the released code computes, slots at three places of a row of plain ids, and words that vectors start from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from double import InDouble
from fixture_file import FixtureFile
from hosts import host
from shared import fixtures
from tiny import EXACT, WIDTH, excite, run, tiny
from torch import Tensor, nn

from adalink import (
    ANSWER,
    IMAGE,
    METHODS,
    PAD,
    PROMPT,
    TEXT,
    WARP,
    AdaptedModel,
    Adapter,
    Anatomy,
    DePT,
    Gated,
    Method,
    Prompt,
    TokenMap,
    attach,
)
from adalink.attachment.inputs import Reserved
from adalink.checkpoint.folder import method_from_json, method_to_json
from adalink.edit import Slots
from adalink.errors import ConfigError
from adalink.methods.prompts.prompt import worded
from multimodal.loss.answer_head import AnswerHead

FILES = {path.stem: path for path in fixtures("warp").glob("*.safetensors")}


def placed(case: FixtureFile, model: Any, method: WARP) -> tuple[Adapter, AnswerHead]:
    """The method's adapter and its head with the weights of the file, attached."""
    adapter = Adapter({"warp": method}, Anatomy.read(model)).double()
    head = AnswerHead([str(i) for i in range(len(case.tensors["verbaliser.bias"]))], 16, method).double()
    with torch.no_grad():
        adapter.get_parameter("warp.soft.table").copy_(case.tensors["prompt"])
        head.linear.weight.copy_(case.tensors["verbaliser.weight"])
        head.linear.bias.copy_(case.tensors["verbaliser.bias"])
    return adapter, head


def check(case: FixtureFile, adapter: Adapter, head: AnswerHead, state: Tensor) -> None:
    logits = head(state)
    loss = nn.functional.cross_entropy(logits, case.tensors["in.answer"])
    loss.backward()
    close(state, case.tensors["out.state"])
    close(logits, case.tensors["out.logits"])
    close(loss, case.tensors["out.loss"])
    found = {"prompt": adapter.get_parameter("warp.soft.table"), "verbaliser.weight": head.linear.weight, "verbaliser.bias": head.linear.bias}
    for name, parameter in found.items():
        close(parameter.grad, case.tensors[f"grad.{name}"])


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-10)


@pytest.mark.skipif("roberta" not in FILES, reason="no reference computations")
def test_it_equals_the_released_code_in_the_middle_of_a_text() -> None:
    from transformers import RobertaConfig, RobertaForMaskedLM

    case = FixtureFile.read(FILES["roberta"])
    with InDouble():
        model: Any = RobertaForMaskedLM(RobertaConfig(**case.spec["config"], _attn_implementation="eager")).double().eval().requires_grad_(False)
        missing = model.load_state_dict(case.under("w."), strict=False).missing_keys
        assert all("decoder" in name or "position_ids" in name or "token_type_ids" in name for name in missing)
        adapter, head = placed(case, model, WARP(start=len(case.tensors["prompt"]), after_text=0))
        attachment = attach(model, adapter)
        ids, mask, rows = case.tensors["in.input_ids"], case.tensors["in.attention_mask"], torch.arange(len(case.tensors["in.input_ids"]))
        is_slot = torch.isin(ids, torch.tensor(case.spec["placeholder_ids"]))
        domain = torch.where(is_slot, PROMPT, torch.where(mask == 1, TEXT, PAD))
        with attachment.bind(TokenMap(domain, torch.zeros_like(rows))):
            hidden = model.roberta(input_ids=ids, attention_mask=mask).last_hidden_state[rows, case.tensors["in.mask_at"]]
        check(case, adapter, head, model.lm_head.layer_norm(nn.functional.gelu(model.lm_head.dense(hidden))))


@pytest.mark.skipif("opt_vqa" not in FILES, reason="no reference computations")
def test_a_word_that_is_the_placeholder_of_a_slot_stays_a_word() -> None:
    """The released code replaces it: its slots are found by their ids."""
    case = FixtureFile.read(FILES["opt_vqa"])
    with InDouble():
        model: Any = host({"model_type": "opt", **case.spec["config"]}, case.under("w."))
        adapter, _ = placed(case, model, WARP(start=1, after_text=4))
        ids = torch.tensor([[1, 7, 1, 9, 1]])  # 1 stands at the slots, and for a word of the question
        with attach(model, adapter).bind(TokenMap(torch.tensor([[PROMPT, TEXT, TEXT, TEXT, PROMPT]]), torch.tensor([0]))):
            found = model(input_ids=ids).logits
        vectors = case.under("w.")["model.decoder.embed_tokens.weight"].double()[ids]
        vectors[0, [0, 4]] = case.tensors["prompt"][:2].double()
        close(found, model(inputs_embeds=vectors).logits)


@pytest.mark.skipif("opt_vqa" not in FILES, reason="no reference computations")
def test_it_equals_the_reference_on_a_decoder_with_images_alone_and_padded() -> None:
    case = FixtureFile.read(FILES["opt_vqa"])
    counts, lengths, words = case.spec["slots"], case.spec["lengths"], case.tensors["in.text_ids"]
    first, between, last = (counts[name] for name in ("before_image", "before_text", "after_text"))
    n_image, longest = case.tensors["in.image"].shape[1], max(lengths)
    rows = [[PROMPT] * first + [IMAGE] * n_image + [PROMPT] * between + [TEXT] * n + [PROMPT] * last for n in lengths]
    length = max(map(len, rows))
    domain = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    ids = torch.zeros_like(domain)
    for i, n in enumerate(lengths):
        ids[i, domain[i] == TEXT] = words[i, :n]
    assert longest == words.shape[1]
    with InDouble():
        model: Any = host({"model_type": "opt", **case.spec["config"]}, case.under("w."))
        adapter, head = placed(case, model, WARP(start=first, before_text=between, after_text=last))
        attachment, table = attach(model, adapter), model.get_input_embeddings().weight

        def states(ids: Tensor, domain: Tensor, image: Tensor) -> Tensor:
            embeds = table[ids].double()
            embeds[domain == IMAGE] = image.double().flatten(0, 1)
            mask, token_map = (domain != PAD).long(), TokenMap(domain, torch.zeros(len(ids), dtype=torch.int64))
            with attachment.bind(token_map):
                hidden = model.model(inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).last_hidden_state
            is_last = (token_map.domain == PROMPT) & (token_map.ordinal == method_length - 1)
            return hidden[is_last]

        method_length = first + between + last
        together = states(ids, domain, case.tensors["in.image"])
        check(case, adapter, head, together)
        alone = [states(ids[i : i + 1, -len(row) :], domain[i : i + 1, -len(row) :], case.tensors["in.image"][i : i + 1]) for i, row in enumerate(rows)]
        torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-12)
        head.start_from(model, [[word] for word in case.spec["answer_init_words"]])
        assert torch.equal(head.linear.bias, torch.zeros(4).double())
        close(head(together), case.tensors["out.start_logits"])


MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
DOMAIN = torch.tensor([[PAD, IMAGE, TEXT, TEXT], [TEXT, TEXT, ANSWER, PAD]])


def test_slots_of_plain_rows_come_after_the_images_and_before_the_answer() -> None:
    slots = [(Slots(PROMPT, 1), Slots(PROMPT, 1, "before_text"), Slots(PROMPT, 1, "after_text")), (Slots(PROMPT, 2, "after_text"),)]
    ids = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]])
    right, left = (Reserved(MASK, slots, side, DOMAIN) for side in ("right", "left"))
    assert right.widened(ids, 9, 0).tolist() == [[0, 9, 1, 9, 2, 3, 9], [4, 5, 9, 9, 6, 0, 0]]
    assert left.widened(ids, 9, 0).tolist() == [[0, 9, 1, 9, 2, 3, 9], [0, 4, 5, 9, 9, 6, 0]]
    assert right.widened_domains(DOMAIN)[0].tolist() == [PAD, PROMPT, IMAGE, PROMPT, TEXT, TEXT, PROMPT]
    positions = torch.tensor([[0, 0, 1, 2], [0, 1, 2, 0]])
    assert right.widened_positions(positions).tolist() == [[0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 2, 0]]
    assert right.own(right.widened(ids, 9, 0)).tolist() == ids.tolist()
    assert right.own(right.widened(ids, 9, 0), following=True).tolist() == [[0, 1, 2, 9], [4, 9, 6, 0]]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_all_slots_at_the_start_are_a_prompt_bit_for_bit_and_others_are_read_where_they_stand(family: str) -> None:
    model = AdaptedModel(tiny(family))
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    found = {}
    methods: dict[str, Method] = {"prompt": Prompt(length=3), "warp": WARP(start=3, after_text=0), "after": Prompt(length=3, at="after_text")}
    for name, method in methods.items():
        torch.manual_seed(0)
        excite(model.add_adapter(name, method).double())
        found[name] = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(found["prompt"], found["warp"])
    table: Any = model.active_adapter().get_parameter("prompt.soft.table")
    vectors = torch.cat([model.get_input_embeddings()(ids[1:, :3]), table[None]], 1)
    with model.disable_adapter():
        alone = model.base(inputs_embeds=vectors).logits
    bare = run(model.base, ids, mask)
    torch.testing.assert_close(found["after"][1, :2], bare[1, :2], rtol=EXACT[family], atol=EXACT[family])  # causal: words before it do not read it
    torch.testing.assert_close(found["after"][1, 2], alone[0, -1], rtol=EXACT[family], atol=EXACT[family])  # what follows the prompt
    served = model(input_ids=ids, attention_mask=mask, adapter_names=["__base__", "after"]).logits
    torch.testing.assert_close(served[0], bare[0], rtol=EXACT[family], atol=EXACT[family])
    torch.testing.assert_close(served[1, :3], found["after"][1, :3], rtol=EXACT[family], atol=EXACT[family])


def test_slots_before_the_answer_are_generated_after_with_and_without_a_cache() -> None:
    model = AdaptedModel(tiny("llama"))
    excite(model.add_adapter("a", Prompt(length=2, at="after_text")).double())
    ids, mask = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    given: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **given)
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **given), together)
    assert torch.equal(model.generate(ids[:1, 1:], **given)[0, 3:], together[0, 4:])
    first = model(input_ids=ids[1:]).logits[0, -1].argmax()
    assert first == together[1, 4]
    labels = torch.cat([torch.full_like(ids[1:], -100), together[1:, 4:]], 1)
    loss = model(input_ids=together[1:], labels=labels).loss  # the slots are between the prompt and what has labels
    logits = torch.stack([model(input_ids=together[1:, : 4 + n]).logits[0, 3] if n == 0 else step(model, together, n) for n in range(4)])
    torch.testing.assert_close(loss.double(), nn.functional.cross_entropy(logits, together[1, 4:]), rtol=1e-6, atol=1e-6)


def step(model: AdaptedModel, together: Tensor, n: int) -> Tensor:
    """The logits after n tokens of the second row's answer."""
    labels = torch.cat([torch.full((1, 4), -100), together[1:, 4 : 4 + n]], 1)
    return model(input_ids=together[1:, : 4 + n], labels=labels).logits[0, -1]


def test_vectors_start_from_the_frozen_embeddings_of_words() -> None:
    model = AdaptedModel(tiny("opt"))
    table = model.get_input_embeddings().weight.float()
    ids = {"a photo of": [4, 5, 6], "a": [4], "photo": [5, 7]}
    for words, length, wanted in (
        ("a photo of", 5, table[[4, 5, 6, 4, 5]]),
        ("a photo of", 2, table[[4, 5]]),
        (("a", "photo"), 2, torch.stack([table[4], table[[5, 7]].mean(0)])),
    ):
        for kind in (Prompt, DePT):
            more: dict[str, Any] = {"rank": 1} if kind is DePT else {}
            method = worded(kind(length=length, words=words, **more), ids.__getitem__)
            name = f"a{model._n_ever}"
            found = model.add_adapter(name, method).get_parameter(f"{kind.__name__.lower()}.soft.table")
            assert torch.equal(found, wanted)
            assert model.start is not None
            assert method_from_json(method_to_json(method)) == method
    gated = worded(Gated(inner=Prompt(length=1, words="a")), ids.__getitem__)
    assert gated == Gated(inner=Prompt(length=1, words="a", ids=((4,),)))
    assert gated.inner.ids == ((4,),)  # type: ignore[attr-defined]
    scaled: Any = tiny("llama")
    scaled.get_input_embeddings().embed_scale = torch.tensor(3.0)
    (one,) = Prompt(length=1, ids=((4,),)).place(Anatomy.read(scaled))
    torch.testing.assert_close(one.edit.get_parameter("table")[0], 3.0 * scaled.get_input_embeddings().weight[4].float())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prompt(length=2, at="middle"), "the prompt is at 'middle': give start, before_text or after_text"),  # type: ignore[arg-type]
        (lambda: Prompt(length=2, at="after_text", positions="none"), "the prompt is at after_text with positions none, and only slots at the start"),
        (lambda: Prompt(length=2, words="a", form="mlp"), "the prompt's form is mlp, whose vectors are made by a network"),
        (lambda: Prompt(length=2, ids=((1,), ())), r"the prompt's ids are \[\[1\], \[\]\]: give for each slot one id of 0 or more"),
        (lambda: WARP(words=(1,)), r"WARP's words are \[1\]: give one text, or a list"),  # type: ignore[arg-type]
        (lambda: WARP(after_text=0), "WARP has 0, 0, 0 slots at start, before_text, after_text: give 0 or more for each, and 1 or more in all"),
        (lambda: WARP(start=-1), "WARP has -1, 0, 20 slots"),
        (lambda: WARP(domain=5), "WARP's domain is 5: give 3, or 6 to 14 beside another prompt"),
        (lambda: WARP(verbaliser="old"), "WARP's verbaliser is 'old': give words, fixed or new"),  # type: ignore[arg-type]
        (lambda: WARP(most_unlisted=1.5), "WARP's most_unlisted is 1.5 and its init_std 0.02: give a share from 0 to 1"),
        (lambda: worded(Prompt(length=3, words=("a", "b")), lambda text: [4]), "a prompt of 3 slots has a list of 2 words: give one for each slot"),
        (lambda: worded(Prompt(length=3, words=" "), lambda text: []), "a prompt starts from ' ', and the tokenizer makes nothing of it"),
        (lambda: worded(WARP(after_text=2, words=("a", "")), lambda text: [4] * len(text)), r"a prompt starts from \('a', ''\), and the tokenizer makes nothing of it, or of a word of it"),
        (lambda: AdaptedModel(tiny("opt")).add_adapter("a", Prompt(length=1, words="a")), "a bare model has no tokenizer: add it to a VisionLanguageModel"),
        (lambda: AdaptedModel(tiny("opt")).add_adapter("a", Prompt(length=1, ids=((64,),))), "the prompt's ids go up to 64, and the model has 64 words"),
        (lambda: AdaptedModel(tiny("opt")).add_adapter("a", Prompt(length=2, ids=((6,),))), "the prompt's ids are those of 1 words, and it has 2 slots"),
        (lambda: AnswerHead(["yes"], WIDTH, WARP()), "WARP was given one answer, 'yes', so there is nothing to choose"),
        (lambda: AnswerHead(["Red ball", "no", "red  ball"], WIDTH, WARP()), "the answers 'Red ball' and 'red  ball' differ in capitals and spaces alone"),
        (lambda: generating(), "the adapter a answers from a list and writes nothing: give it the list in a VisionLanguageModel"),
    ],
)
def test_what_it_refuses(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def generating() -> None:
    model = AdaptedModel(tiny("opt"))
    model.add_adapter("a", WARP(after_text=1)).double()
    model.generate(torch.tensor([[4, 5]]), max_new_tokens=1)


def test_it_stands_beside_another_prompt_in_a_domain_of_its_own() -> None:
    model = AdaptedModel(tiny("opt"))
    with pytest.raises(ConfigError, match="prompt and warp reserve slots of the same domain"):
        model.add_adapter("a", {"prompt": Prompt(length=1), "warp": WARP(after_text=1)})
    adapter = model.add_adapter("a", {"prompt": Prompt(length=1), "warp": WARP(after_text=2, domain=6)})
    assert adapter.slots == (Slots(PROMPT, 1), Slots(6, 2, "after_text"))
    assert METHODS["warp"] is WARP
