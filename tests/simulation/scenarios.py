"""What runs on the simulated GPU: the product's own entry points, each as a function that makes a step, which is run twice.

The first call moves weights and tries models out; what the second one does is the steady state.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from device import Finding, Record, SimulatedGpu, simulated_gpu
from models import METHODS, batch_of, composed, existing, images, language, questions, scratch, with_adapted_encoder, with_connectors
from processes import sharded
from torch import Tensor
from torch.distributed.tensor import DTensor

from adalink import AdaLink, AdaptedModel, Prefix, Prompt
from adalink.public import BASE_NAME
from multimodal.batches.collate import Batch, collate, stacked
from multimodal.batches.packing import Arrange, fork_rows, pack_rows, separate_rows
from multimodal.generation.decoding import Decoding
from multimodal.generation.settings import GenerationSettings
from multimodal.model import TrainedParts, VisionLanguageModel
from multimodal.training.distributed import take_off, together
from multimodal.training.prepare import hidden_state_model, new_optimizer, offloaded
from multimodal.training.settings import TrainSettings

__all__ = ["FAULTS", "SCENARIOS", "Outcome", "run"]

Step = Callable[[], None]
Make = Callable[[SimulatedGpu], Step]


@dataclass(frozen=True)
class Outcome:
    """What a scenario did: in its first call, and in its second."""

    first: list[Finding]
    steady: list[Finding]

    def of(self, *kinds: str) -> list[Finding]:
        """What the second call did."""
        return [finding for finding in self.steady if finding.kind in kinds]


def run(name: str) -> Outcome:
    """Run the step of a scenario twice, or that of the control."""
    torch.manual_seed(0)
    with simulated_gpu() as gpu:
        step = SCENARIOS.get(name, faulty)(gpu)
        step()
        first, gpu.record = gpu.record, Record()
        step()
        return Outcome(sorted(first.found), sorted(gpu.record.found))


# ----------------------------------------
# Training.


def learns(
    gpu: SimulatedGpu, model: VisionLanguageModel, *, row_tokens: int = 0, arrange: Arrange | None = None, checkpointing: bool = False, states: float = 0.0,
    offloads: bool = False,
) -> Step:
    """One training step: a batch to the device, loss, gradients, AdamW. The first loss is that of a copy of the model on the CPU."""
    batch = batch_of(model, row_tokens=row_tokens, arrange=arrange)
    wanted = [] if any(isinstance(parameter, DTensor) for parameter in model.parameters()) else [_loss_of_a_copy(model, batch)]
    model.to(gpu.device).train()
    if checkpointing:
        model.adapted.attachment.checkpoint_layers()
    parameters = TrainedParts.of(model).parameters()
    optimizer = new_optimizer(parameters, TrainSettings())

    def step() -> None:
        torch.manual_seed(0)
        with hidden_state_model(model, states, 0), offloaded(model, 0) if offloads else contextlib.nullcontext():
            loss = model(batch.to(gpu.device))
            loss.backward()
        while wanted:
            torch.testing.assert_close(loss.detach().host, wanted.pop(), rtol=1e-4, atol=0)
        assert loss.device.type == gpu.device.type
        assert loss.dtype == torch.float32
        assert any(parameter.grad is not None for parameter in parameters.values()), "nothing was learnt"
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _loss_of_a_copy(model: VisionLanguageModel, batch: Batch) -> Tensor:
    twin = copy.deepcopy(model).train()
    torch.manual_seed(0)
    return twin(batch).detach()


def chooses(gpu: SimulatedGpu) -> Step:
    """A head that chooses answers over BERT's state: trained, then asked; rows of two adapters, one of them with a head of its own."""
    model = composed("bert", prompt="<image>question: {question}", a="lora", b="adalink")
    model.add_answer_head(["no", "yes", "two"])
    model.set_adapter("a")
    model.add_answer_head(["yes", "no"])
    step = learns(gpu, model)

    def both() -> None:
        step()
        texts = model.generate(images(3), questions(3), adapter_names=["a", "b", "a"])
        assert len(texts) == 3

    return both


def loops(gpu: SimulatedGpu, make: Callable[[], VisionLanguageModel], **settings: Any) -> Step:
    """`train` as a whole, with a checkpoint and a resume; accelerate's device is the simulated one. Waits are noted inside its steps alone."""
    from accelerate.state import PartialState

    from multimodal.training.train import _Run, train
    from tasks.captioning import Captioning
    from tasks.scenes.dataset import Scenes

    PartialState(cpu=True)
    take_step = _Run.step

    def noted(training: _Run, group: Any, step: int, n_steps: int) -> Any:
        gpu.sees_waits = step > training.first  # the first one tries the model out
        try:
            return take_step(training, group, step, n_steps)
        finally:
            gpu.sees_waits = False

    def step() -> None:
        gpu.sees_waits = False
        with mock.patch.dict(PartialState._shared_state, device=gpu.device), mock.patch.object(_Run, "step", noted):
            model, folder = make(), scratch()
            fields = {"steps": 3, "batch_size": 2, "log_every": 100, "checkpoint_every": 100, **settings}
            train(model, Scenes(split="train", size=8), Captioning().texts, TrainSettings(**fields), folder)
            train(model, Scenes(split="train", size=8), Captioning().texts, TrainSettings(**{**fields, "steps": 5}), folder, resume=True)

    return step


def shards(gpu: SimulatedGpu, kind: str, dtype: torch.dtype = torch.float32) -> Step:
    """Training steps of a model that FSDP2 splits, of which the second is looked at; then it generates put together, and made whole again."""

    def step() -> None:
        gpu.sees_waits = False
        model = composed("llama", dtype, a=kind)
        model.to(gpu.device)
        with sharded(model):
            learn = learns(gpu, model, arrange=pack_rows)
            learn()
            gpu.sees_waits = True
            learn()
            gpu.sees_waits = False
            with together(model):
                model.generate(images(2), questions(2), max_new_tokens=2)
            take_off(model)
        model.generate(images(2), questions(2), max_new_tokens=2)

    return step


def encodes(gpu: SimulatedGpu) -> Step:
    """Images through the encoder into a table in memory, and into the records of a folder."""
    from multimodal.data.feature_cache.encode import encode_all
    from multimodal.data.feature_cache.format import all_contents
    from multimodal.data.feature_cache.reader import bind
    from tasks.scenes.dataset import Scenes

    model = composed("opt", a="adalink")
    model.to(gpu.device)
    source = Scenes(split="val", size=8)

    def step() -> None:
        table: Any = encode_all(model, source)
        assert table.patches.device.type == "cpu"
        contents: Any = all_contents(model.vision_tower)
        contents.of(model.vision_tower.encode(torch.stack([model.vision_tower.preprocess(image) for image in images(2)])))
        bind(model.vision_tower, source)

    return step


# ----------------------------------------
# Generation.


def writes(gpu: SimulatedGpu, model: VisionLanguageModel, names: Sequence[str | None], *, beams: int = 1) -> Step:
    """`model.generate` for rows of several adapters about two images."""
    model.to(gpu.device)

    def step() -> None:
        about = [images(2)[i % 2] for i in range(len(names))]
        settings = GenerationSettings(max_new_tokens=5, num_beams=beams)
        assert len(model.generate(about, questions(len(names)), settings=settings, adapter_names=names)) == len(names)

    return step


def decodes(gpu: SimulatedGpu, model: VisionLanguageModel, names: Sequence[str]) -> Step:
    """One token for every row of a running batch, and nothing else."""
    model.to(gpu.device)
    decoding = Decoding(model.language, model.adapted.attachment)
    read = [model.tower.preprocess(image) for image in images(len(names))]
    rows = [model.row_encoder(name).prompt("is it red?", image) for name, image in zip(names, read, strict=True)]
    batch = collate(rows, range(len(names)), stacked(read), kind="pixels", side="left", pad_id=model.language.tokenizer.pad_token_id).to(gpu.device)
    with torch.no_grad():
        newest = decoding.join(batch, model.token_map(batch, names), may_share=False).argmax(-1)

    def step() -> None:
        with torch.no_grad():
            decoding.step(newest)

    return step


def serves(gpu: SimulatedGpu, model: VisionLanguageModel, *, drawn: bool = False, known: bool = False) -> Step:
    """The server's running batch: rows join, take their tokens and leave; a second question about an image is read from where it differs."""
    from tasks.serve.engine import FeatureLRU, PromptCache, Running
    from tasks.serve.sampling import Sampling
    from tasks.serve.scheduler import Ask, Job, ServedImage

    model.to(gpu.device)
    running = Running(model, FeatureLRU(model, 8), PromptCache(2**26))
    names = list(model.adapted.adapters)
    read = [model.tower.preprocess(image) for image in images(2)]

    def job(i: int, question: str, n_new: int) -> Job:
        sampling = Sampling(temperature=0.8, top_p=0.9, seed=i) if drawn else None
        name, image = names[i % len(names)], ServedImage(f"image {i % 2}", read[i % 2])
        row, settings = model.row_encoder(name).prompt(question, read[i % 2]), GenerationSettings(max_new_tokens=n_new)
        return Job(Ask(adapter=name, row=row, images=(image,), settings=settings, sampling=sampling), streams=True, loop=_Loop())  # type: ignore[arg-type]

    def step() -> None:
        jobs = [job(i, "is it red?", 4 + i) for i in range(3)]
        running.join(jobs[:2])
        running.step()
        running.join(jobs[2:])
        if known:
            jobs += (more := [job(i, "is it red? no", 6) for i in range(2)])
            running.join(more)
        while running.rows:
            running.step()
        assert all(one.ended for one in jobs)

    return step


class _Loop:
    """An event loop that calls at once."""

    def call_soon_threadsafe(self, call: Callable[[Any], None], event: Any) -> None:
        with_no_listener: asyncio.Queue[Any] = asyncio.Queue()
        with_no_listener.put_nowait(event)


def adapts(gpu: SimulatedGpu, family: str) -> Step:
    """A language model alone, by the methods that users of peft know: a loss with labels, and transformers' own generation with slots and beams."""
    model = AdaptedModel(language(family).model)
    model.add_adapter("a", {"prefix": Prefix(length=2, form="table", init_std=0.5), "adalink": AdaLink(rank=2, modalities=("text",))})
    model.add_adapter("b", {"prompt": Prompt(length=3, init_std=0.5)})
    model.to(gpu.device)
    ids = torch.tensor([[5, 6, 7, 8], [1, 1, 9, 10], [11, 12, 13, 14]])
    mask = (ids != 1).long()

    def step() -> None:
        names, on, seen = ["a", "b", BASE_NAME], ids.to(gpu.device), mask.to(gpu.device)
        model(input_ids=on, attention_mask=seen, labels=on, adapter_names=names).loss.backward()
        model.generate(input_ids=on, attention_mask=seen, adapter_names=names, max_new_tokens=4, do_sample=False, num_beams=2)

    return step


# ----------------------------------------
# All of them.


def _mixed(family: str) -> VisionLanguageModel:
    return composed(family, a="adalink", b="lora", c="prompt")


def _trains(family: str, kind: str, dtype: torch.dtype = torch.float32) -> Make:
    return lambda gpu: learns(gpu, composed(family, dtype, a=kind))


HALF, SHORT = torch.bfloat16, torch.float16
TRAINED: Mapping[str, Make] = {
    **{f"train {kind}": _trains("opt", kind) for kind in METHODS},
    "train scenes": lambda gpu: learns(gpu, composed("scenes", a="lora")),
    "train gpt2": lambda gpu: learns(gpu, composed("gpt2", a="adalink")),
    "train t5": lambda gpu: learns(gpu, composed("t5", a="adalink")),
    "train bloom, forked": lambda gpu: learns(gpu, composed("bloom", a="adalink")),
    "train gemma2, windows": lambda gpu: learns(gpu, composed("gemma2", a="adalink")),
    "train llama, forked": lambda gpu: learns(gpu, composed("llama", a="adalink"), arrange=fork_rows),
    "train llama, apart": lambda gpu: learns(gpu, composed("llama", a="lora"), arrange=separate_rows),
    "train llama, joined": lambda gpu: learns(gpu, composed("llama", a="adalink"), row_tokens=128),
    "train checkpointing": lambda gpu: learns(gpu, composed("llama", a="lora"), checkpointing=True),
    "train offload": lambda gpu: learns(gpu, composed("llama", a="lora"), offloads=True),
    "train states_gib": lambda gpu: learns(gpu, composed("opt", a="epalm"), states=0.01),
    "train adapted encoder": lambda gpu: learns(gpu, with_adapted_encoder()),
    "train bert, head": chooses,
    **{f"train {kind}, bfloat16": _trains("llama", kind, HALF) for kind in METHODS if kind not in ("text", "epalm_published")},
    "train gpt2, bfloat16": lambda gpu: learns(gpu, composed("gpt2", HALF, a="adalink")),
    "train opt, float16": lambda gpu: learns(gpu, composed("opt", SHORT, a="lora")),
    "train llava": lambda gpu: learns(gpu, existing("llava", a="text")),
    "train llava, bfloat16": lambda gpu: learns(gpu, existing("llava", HALF, a="lora")),
    "train qwen2_vl": lambda gpu: learns(gpu, existing("qwen2_vl", a="lora")),
    "train qwen2_vl, joined": lambda gpu: learns(gpu, existing("qwen2_vl", a="text"), row_tokens=256),
    "train gemma3": lambda gpu: learns(gpu, existing("gemma3", a="text")),
    "train llava, connector, bfloat16": lambda gpu: learns(gpu, with_connectors("llava", HALF)),
    "train qwen2_vl, connector": lambda gpu: learns(gpu, with_connectors("qwen2_vl", trains="low_rank")),
    "loop": lambda gpu: loops(gpu, lambda: composed("opt", a="adalink")),
    "loop, accumulation and memory": lambda gpu: loops(gpu, lambda: composed("opt", a="adalink"), accumulation=2, features="memory"),
    "loop, llava": lambda gpu: loops(gpu, lambda: existing("llava", a="lora")),
    "FSDP2": lambda gpu: shards(gpu, "adalink"),
    "FSDP2, bfloat16": lambda gpu: shards(gpu, "lora", HALF),
    "encode": encodes,
}  # fmt: skip
WRITTEN: Mapping[str, Make] = {
    "generate mixed": lambda gpu: writes(gpu, _mixed("llama"), ["a", "b", None, "c"]),
    "generate mixed, opt": lambda gpu: writes(gpu, _mixed("opt"), ["a", "b", None, "c"]),
    "generate shared prefill": lambda gpu: writes(gpu, composed("llama", a="adalink"), ["a"] * 4),
    "generate beams": lambda gpu: writes(gpu, _mixed("llama"), ["a", "b", None, "c"], beams=3),
    "generate bfloat16": lambda gpu: writes(gpu, composed("llama", HALF, a="adalink", b="lora"), ["a", "b", "a"]),
    "generate t5": lambda gpu: writes(gpu, _mixed("t5"), ["a", "b", None, "c"]),
    "generate unipelt": lambda gpu: writes(gpu, composed("opt", a="unipelt", b="gated"), ["a", "b", "a"]),
    "generate recompute": lambda gpu: writes(gpu, composed("opt", a="epalm_published"), ["a", "a", None]),
    "generate prefix": lambda gpu: writes(gpu, composed("llama", a="prefix", b="epalm"), ["a", "b", "a"]),
    "generate llava": lambda gpu: writes(gpu, existing("llava", a="text", b="lora"), ["a", "b", None]),
    "generate qwen2_vl": lambda gpu: writes(gpu, existing("qwen2_vl", a="lora"), ["a", "a", None]),
    "generate qwen2_vl, beams": lambda gpu: writes(gpu, existing("qwen2_vl", a="lora"), ["a", "a", None], beams=2),
    "generate qwen2_vl, connectors": lambda gpu: writes(gpu, with_connectors("qwen2_vl"), ["copy", "low_rank", None, "frozen"]),
    "decode one adapter": lambda gpu: decodes(gpu, composed("llama", a="adalink"), ["a"] * 4),
    "decode frozen": lambda gpu: decodes(gpu, composed("llama", a="adalink"), [BASE_NAME] * 4),
    "decode mixed": lambda gpu: decodes(gpu, _mixed("llama"), ["a", "b", "c", BASE_NAME]),
    "serve": lambda gpu: serves(gpu, _mixed("llama")),
    "serve drawn": lambda gpu: serves(gpu, _mixed("llama"), drawn=True),
    "serve known prompts": lambda gpu: serves(gpu, _mixed("llama"), known=True),
    "serve llava": lambda gpu: serves(gpu, existing("llava", a="text", b="lora")),
    "language alone, llama": lambda gpu: adapts(gpu, "llama"),
    "language alone, opt": lambda gpu: adapts(gpu, "opt"),
}
SCENARIOS: Mapping[str, Make] = {**TRAINED, **WRITTEN}


# ----------------------------------------
# The control: faults in an edit that runs in each step, each of which must be found.


FAULTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "a .cpu()": lambda h: h + h.detach().cpu().to(h.device, non_blocking=True),
    "an .item()": lambda h: h + h.detach().mean().item(),
    "a bool()": lambda h: h if (h > 1e9).any() else h + 1,
    "an index by a mask": lambda h: h + h[h > 0].mean(),
    "a tensor of a list": lambda h: h + torch.tensor([1.0, 2.0], dtype=h.dtype, device=h.device).mean(),
    "a tensor on the CPU": lambda h: h + torch.ones(h.shape[-1], dtype=h.dtype),
    "a float64 constant": lambda h: h + torch.ones(h.shape[-1], device=h.device, dtype=torch.float64).mean().to(h.dtype),
    "a float32 constant": lambda h: h + torch.ones(h.shape[-1], device=h.device),
}


def faulty(gpu: SimulatedGpu) -> Step:
    """A training step in bfloat16 with all the faults, one after the other."""
    model = composed("llama", HALF, a="adalink")
    adapter = model.adapted.active_adapter().to(HALF)
    edit = next(placement.edit for placement in adapter.placements if placement.role.startswith("adalink"))
    own = edit.forward

    def forward(*arguments: Any) -> Tensor:
        h: Tensor = own(*arguments)
        for fault in FAULTS.values():
            h = fault(h)
        return h

    edit.forward = forward  # type: ignore[method-assign]
    return learns(gpu, model)
