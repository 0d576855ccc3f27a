"""What a model does around its head is found out, and done; where it is not understood, the model's own logits are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import EXACT, FEATURE_WIDTH, N_PATCHES, VOCABULARY, WIDTH, excite, tiny
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from adalink import TEXT, AdaLink, AdaptedModel, Anatomy, Bridge, InputSpec, Placement, Port, Slots, TokenMap, Tokens
from multimodal.loss.language_loss import Finish, WordHead, read_word_head

NONE = -100
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OTHERS: dict[str, tuple[Any, Finish]] = {
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0)), Finish(cap=3.0)),
    "cohere": (lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)), Finish(scale=0.3)),
    "granite": (lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=7.0)), Finish(scale=1 / 7.0)),
    "phi, whose head has a bias": (lambda: PhiForCausalLM(PhiConfig(**{**SIZES, "num_key_value_heads": 4})), Finish()),
    "bart": (
        lambda: BartForConditionalGeneration(
            BartConfig(vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                       encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        ),
        Finish(),
    ),
}  # fmt: skip
FAMILIES = ["llama", "qwen2", "opt", "gpt2", "t5", *OTHERS]


def model_of(family: str) -> Any:
    if family not in OTHERS:
        return tiny(family)
    torch.manual_seed(0)
    model = OTHERS[family][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if parameter.ndim == 1 else 0.0))
    return model.double().eval().requires_grad_(False)


def adapted(family: str) -> AdaptedModel:
    model = AdaptedModel(model_of(family), inputs={"image": InputSpec(N_PATCHES, FEATURE_WIDTH)})
    methods = {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("text",))}
    excite(model.add_adapter("a", methods).double())
    return model


def call(model: AdaptedModel) -> tuple[dict[str, Any], TokenMap, Tensor, Tensor]:
    """Arguments of a padded batch with its token map, and its source and target pairs."""
    torch.manual_seed(5)
    ids, domain = torch.randint(3, VOCABULARY, (2, 9)), torch.tensor([[2] * N_PATCHES + [0] * 6, [2] * N_PATCHES + [0] * 4 + [-1] * 2])
    image = torch.randn(2, N_PATCHES, FEATURE_WIDTH, dtype=torch.float64)
    mask = (domain >= 0).long()
    source, target = torch.tensor([[2, 3, 3, 7], [2, 4, 0, 0]]), torch.tensor([[5, 6, 9, 2], [8, 2, NONE, NONE]])
    arguments = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if model.base.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 8))
    else:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return arguments, TokenMap(domain, model.rows(2), {"image": image}), source, target


def both(model: AdaptedModel, head: WordHead) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients of a head, and as the model's own logits have them."""
    arguments, token_map, source, target = call(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for ours in (True, False):
        with model.attachment.bind(token_map):
            if ours:
                loss = head.loss(model.base, arguments, source, target)
            else:
                logits = torch.take_along_dim(model.base(**arguments).logits, source[..., None], 1)
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        results.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    return results[0], results[1]


def assert_equal(ours: list[Tensor], theirs: list[Tensor], atol: float = 1e-10) -> None:
    assert any(gradient.abs().max() > 1e-3 for gradient in theirs[1:])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_the_models_own_logits(family: str) -> None:
    model = adapted(family)
    head = read_word_head(model)
    assert head.note == "logits in chunks of targets, none stored"
    assert head.finish is not None
    expected = OTHERS[family][1] if family in OTHERS else Finish()
    assert (head.finish.scale, head.finish.cap) == (pytest.approx(expected.scale), expected.cap)
    before = dict(vars(head.module))
    assert_equal(*both(model, head), atol=max(1e-10, EXACT.get(family, 1e-6) * 0.1 if family not in ("opt", "gpt2", "bart") else 0))
    assert vars(head.module) == before  # nothing is left on it


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_the_loss_runs_the_head_of_no_token_but_the_targets(family: str) -> None:
    model = adapted(family)
    head = read_word_head(model)
    arguments, token_map, source, target = call(model)
    sizes: list[tuple[int, ...]] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                sizes.append(tuple(result.shape))
            return result

    with model.attachment.bind(token_map), Sizes():
        head.loss(model.base, arguments, source, target).backward()
    tokens = [tuple(ids.shape) for name, ids in arguments.items() if name.endswith("input_ids")]
    assert (source.numel(), VOCABULARY) in sizes
    assert not {(*shape, VOCABULARY) for shape in tokens} & set(sizes)
    assert not {(math.prod(shape), VOCABULARY) for shape in tokens} & set(sizes)


def test_a_model_that_does_something_else_with_its_scores_keeps_its_own_logits() -> None:
    model = adapted("bart")
    model.base.final_logits_bias.normal_()
    head = read_word_head(model)
    assert head.note == "logits of every token at once: what this model makes of its head's scores is not known"
    assert_equal(*both(model, head))


@pytest.mark.parametrize("kind", ["hook", "wrapped forward"])
def test_what_watches_the_head_sees_every_token(kind: str) -> None:
    model = adapted("gpt2")
    seen: list[tuple[int, ...]] = []
    head = read_word_head(model)
    if kind == "hook":
        head.module.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)) or output * 2)
    else:
        own = head.module.forward
        head.module.forward = lambda hidden: own(hidden) * 2 if not seen.append((*hidden.shape[:2], VOCABULARY)) else None
    assert head.note == "logits of every token at once: something is hooked to the head"
    assert_equal(*both(model, head))
    assert seen == [(2, 9, VOCABULARY)] * 2
    assert read_word_head(model).finish is None


def test_a_head_that_is_trained_learns_the_same() -> None:
    model = adapted("gpt2")
    head = read_word_head(model)
    model.base.get_output_embeddings().requires_grad_(True)  # tied: the embedding is trained too
    assert_equal(*both(model, head))


class Low(nn.Linear):
    """A linear with a low-rank change, as other libraries put in a head's place: more than a linear by its class."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__(frozen.in_features, frozen.out_features, bias=False, dtype=frozen.weight.dtype)
        self.weight = frozen.weight
        self.down, self.up = nn.Linear(frozen.in_features, 2, bias=False), nn.Linear(2, frozen.out_features, bias=False)
        self.double()

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + self.up(self.down(hidden))


def test_a_head_with_a_change_of_its_own_trains_it() -> None:
    model = adapted("llama")
    model.base.set_output_embeddings(Low(model.base.get_output_embeddings()))
    assert_equal(*both(model, read_word_head(model)), atol=1e-7)


class Shift(nn.Module):
    """h + b"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        return h + self.bias


@dataclass(frozen=True)
class ShiftAt:
    """A method with one edit, at a module's output."""

    module: str
    width: int

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        return [Placement("shift", Port(self.module, "output"), Shift(self.width), (TEXT,))]


class Flat(GPT2LMHeadModel):
    """A model whose embedding, layers and head are all its own, so that the head is a part of the stack."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.wte, self.h, self.ln_f, inner = self.transformer.wte, self.transformer.h, self.transformer.ln_f, self.transformer
        del self.transformer
        self._inner = [inner.eval()]  # its dropout is no part of this model

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, use_cache: bool = False) -> Any:
        states = self._inner[0](input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)
        return SimpleNamespace(logits=self.lm_head(states.last_hidden_state))


@pytest.mark.parametrize(("port", "width", "note"), [("ln_f", WIDTH, "logits in chunks"), ("lm_head", VOCABULARY, "logits of every token at once: something is hooked")])
def test_an_edit_at_the_final_norm_or_the_head_is_learnt(port: str, width: int, note: str) -> None:
    torch.manual_seed(0)
    flat = Flat(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64)).double().eval()
    model = AdaptedModel(flat, inputs={"image": InputSpec(N_PATCHES, FEATURE_WIDTH)})
    excite(model.add_adapter("a", {"bridge": Bridge(kind="linear"), "shift": ShiftAt(port, width)}).double())
    head = read_word_head(model)
    assert head.note.startswith(note)
    assert_equal(*both(model, head))
