"""Batches of texts about images, and what an adapted tiny model learns from them: loss and gradients, however the texts are arranged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from double import InDouble
from tiny_families import SETTINGS, tiny_of
from torch import Tensor

from adalink import EPALM, IMAGE, AdaLink, AdaptedModel, Bridge, InputSpec, LoRA, Method, Prompt, TokenMap
from multimodal.batches.collate import Batch, collate
from multimodal.batches.packing import joined_rows
from multimodal.batches.prefix_sharing import EAGER_FAMILIES
from multimodal.batches.tokenize import Row
from multimodal.loss.language_loss import LanguageLoss
from multimodal.training.prepare import CompiledModel

N_PATCHES, N_TAPS, FEATURE_WIDTH = 3, 4, 20
INPUTS = {"image": InputSpec(N_PATCHES, FEATURE_WIDTH), "image_taps": InputSpec(N_TAPS, FEATURE_WIDTH)}
PACKED = [name for name in SETTINGS if name not in ("gpt_neo_local", "falcon_alibi", "bloom", "mpt", "olmo", "cohere", "mamba")]
FORKED = [name for name in SETTINGS if name != "mamba"]
EXACT = 1e-10
EAGER = (*EAGER_FAMILIES, "gpt_neo_local", "bloom", "mpt", "mamba")  # transformers knows no sdpa there
TEXTS = [(2, [4, 6, 1]), (2, [5]), (3, [9, 3])]  # of each image: tokens of its prompt, and of each text


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Norms and the softmax of eager attention in float64 too; XGLM makes numbers in the default dtype."""
    before = torch.get_default_dtype()  # another block may be around this one
    torch.set_default_dtype(torch.float64)
    try:
        with InDouble():
            yield
    finally:
        torch.set_default_dtype(before)


def rows(slots: Sequence[int], prefix: int, lengths: Sequence[int], seed: int) -> list[Row]:
    """Rows of one image: slots, image slots, `prefix` shared tokens, then a question of 3 tokens and an answer of each length."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 64, (n,), generator=generator).tolist())

    head, domain = (0,) * (len(slots) + N_PATCHES) + ids(prefix), (*slots, *(IMAGE,) * N_PATCHES, *(0,) * prefix)
    made = []
    for length in lengths:
        question, text = ids(3 if length % 2 else 0), ids(length)
        first = len(head) + len(question) - 1
        kinds = (*domain, *(0,) * len(question), *(1,) * (length - 1))
        made.append(Row((*head, *question, *text[:-1]), kinds, tuple(range(first, first + length)), text))
    return made


def batch_of(
    arrange: Callable[[Sequence[Row]], Sequence[Row]],
    slots: Sequence[int] = (),
    texts: Sequence[tuple[int, Sequence[int]]] = TEXTS,
    row_tokens: int = 0,
) -> Batch:
    arranged = [list(arrange(rows(slots, prefix, lengths, seed))) for seed, (prefix, lengths) in enumerate(texts)]
    flat, image = [row for sample in arranged for row in sample], [i for i, sample in enumerate(arranged) for _ in sample]
    if row_tokens:
        flat, image = joined_rows(flat, image, row_tokens)
    n_retained = N_PATCHES + N_TAPS
    images = torch.randn(len(arranged), n_retained, FEATURE_WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return collate(flat, image, images, kind="patches", side="right", pad_id=0)


def excite(adapter: torch.nn.Module) -> None:
    """Move every weight away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)


def adapted(name: str, methods: Mapping[str, Method] | None = None, attention: str | None = None) -> AdaptedModel:
    """A tiny model with methods of every kind that can read no later token."""
    model = AdaptedModel(tiny_of(name, attention or ("eager" if name in EAGER else "sdpa")), inputs=INPUTS)
    everything: dict[str, Method] = {
        "bridge": Bridge(kind="mlp"),
        "adalink": AdaLink(rank=4, modalities=("image", "text"), activation="gelu"),
        "prompt": Prompt(length=2, init_std=0.5),
        "lora": LoRA(groups={"image": ("image",), "text": ("text",)}, rank=2, alpha=2.0),
    }
    if model.anatomy.positions is None or model.anatomy.positions.module:
        everything["epalm"] = EPALM(layers=(1, 2), n_taps=1, connector="per_tap")  # below, the slot is hidden
    adapter = model.add_adapter("a", methods or everything).double()
    excite(adapter)
    return model


def slots_of(model: AdaptedModel) -> list[int]:
    return [slot.domain for slot in model.active_adapter().slots if slot.domain != IMAGE for _ in range(slot.count)]


def gradients(model: AdaptedModel, batch: Batch, loss_of: LanguageLoss | None = None) -> list[Tensor]:
    """Loss and gradients."""
    assert batch.patches is not None
    retained = batch.patches[batch.image] if batch.token_image is None else batch.patches
    inputs = {"image": retained[:, :N_PATCHES], "image_taps": retained[:, N_PATCHES:]}
    token_map = TokenMap(batch.domain, model.rows(len(batch.ids)), inputs, entry=batch.token_image)
    loss = (loss_of or LanguageLoss(model))(batch, token_map)
    parameters = [parameter for parameter in model.active_adapter().parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def check_equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert sum(bool(one.abs().max() > 0) for one in wanted) > 0.7 * len(wanted)  # nothing reads what the last layer makes of an image
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


def graphs_of(model: AdaptedModel, batches: Sequence[Batch]) -> int:
    """How many graphs a compiled form of the model makes of the batches; it learns the same. Captured and run op by op, which needs no compiler."""
    from torch._dynamo.testing import CompileCounterWithBackend  # late: it loads the compiler

    wanted = [gradients(model, batch) for batch in batches]
    counter, loss = CompileCounterWithBackend("aot_eager"), LanguageLoss(model)
    loss.call = CompiledModel(model, backend=counter)
    for batch, plain in zip(batches, wanted, strict=True):
        for one, other in zip(gradients(model, batch, loss), plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()
    return int(counter.frame_count)
