"""Training throughput and memory for each caption or question, against HF peft with one row per text."""

from __future__ import annotations

import gc
import importlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import timm
import torch
from torch import Tensor

from adalink import IMAGE, TEXT, AdaLink, Adapter, Anatomy, Bridge, Method, TokenMap, attach
from adalink.errors import ConfigError
from multimodal.batches.collate import Batch, collate
from multimodal.data.feature_cache.encode import PatchTable
from multimodal.encoders.base import Loaded, Preprocess
from multimodal.encoders.timm import TimmEncoder
from multimodal.encoders.tower import VisionTower
from multimodal.generation.generate import run_generation
from multimodal.generation.settings import GenerationSettings
from multimodal.model import VisionLanguageModel
from tasks.bench.clock import Finding, Turns, alternate, needs
from tasks.bench.domains import lora
from tasks.bench.existing import LLAVA_60M, QWEN2_VL_60M, TINY_LLAVA, TINY_QWEN2_VL, existing_step
from tasks.bench.ladder import ladder
from tasks.bench.models import (
    PAD_ID,
    TINY_LLAMA,
    Bench,
    Case,
    Machine,
    Shape,
    Taught,
    Work,
    arrange_of,
    as_batch,
    check_peft,
    composed,
    drawn_tower,
    encoded,
    language,
    our_model,
    our_step,
    their_step,
)

__all__ = ["adapters", "against_peft", "existing", "features", "frozen_operations", "generation", "ladder", "lora", "metrics", "shards", "training"]


def training(bench: Bench) -> Iterator[Finding]:
    """Speed and memory of the captions on every language model; questions, and LoRA on text alone, on the first. Raises ConfigError without peft."""
    check_peft()
    sizes = bench.sizes
    taught: Taught
    for shape in sizes.models:
        for taught in ("lora", "prompt"):
            for case in sizes.captions:
                yield _speed(bench, shape, case, taught, "captions")
    for case in sizes.questions:
        yield _speed(bench, sizes.models[0], case, "lora", "questions")
    for case in sizes.text_only:
        yield _speed(bench, sizes.models[0], case, "text lora", "captions")
    for shape in sizes.models:
        for case in sizes.captions:
            yield _memory(bench, shape, case)


def existing(bench: Bench) -> Iterator[Finding]:
    """Models that see already: five captions, five questions and memory, against the usual loop of peft. Raises ConfigError without peft."""
    check_peft()
    is_tiny = bench.sizes.models[0] is TINY_LLAMA
    shapes = (TINY_LLAVA, TINY_QWEN2_VL) if is_tiny else (LLAVA_60M, QWEN2_VL_60M)
    n_patches, faster, smaller = (9, None, None) if is_tiny else (256, 4.0, 5.0)
    texts = {"captions": {}, "questions": {"n_prompt": 8, "n_target": 3}}
    for shape in shapes:
        for name, lengths in texts.items():
            case = Case(work=Work(n_patches=n_patches, **lengths), faster=faster, smaller=smaller)
            for is_encoded in (True, False):
                yield _speed_of_existing(bench, shape, case, name, is_encoded)
        yield _memory(bench, shape, Case(work=Work(n_patches=n_patches), smaller=smaller), "existing")


def _speed_of_existing(bench: Bench, shape: Shape, case: Case, texts: str, is_encoded: bool) -> Finding:
    sides = {
        "adalink": existing_step("adalink", shape, bench.machine, case.work, is_encoded=is_encoded),
        "peft": existing_step("peft", shape, bench.machine, case.work),
    }
    turns = alternate(sides, bench.repetitions, bench.machine.device, bench.machine.dtype)
    how = "cached features" if is_encoded else "each image encoded once a step"
    case = case if is_encoded else replace(case, faster=None)
    return against_peft("existing", f"{shape.name}, lora, {case.work.n_patches} image tokens, {texts}, {how}: faster than peft", turns, case)


def _speed(bench: Bench, shape: Shape, case: Case, taught: Taught, texts: str) -> Finding:
    work, machine = case.work, bench.machine
    model = our_model(shape, machine, drawn_tower(work.n_patches), taught)
    features = work.features(machine)
    repeated = features.repeat_interleave(work.n_texts, 0)
    sides = {
        "adalink": our_step(model, work, lambda: features),
        "peft": their_step(model, shape, machine, work, lambda: repeated, taught),
    }
    turns = alternate(sides, bench.repetitions, machine.device, machine.dtype)
    del model, sides
    gc.collect()  # hooks and modules hold each other, and the next model needs their memory
    return against_peft("training", f"{shape.name}, {taught}, {work.n_patches} image tokens, {texts}: faster than peft", turns, case)


def against_peft(part: str, what: str, turns: Turns, case: Case) -> Finding:
    """A step of both sides, in milliseconds and tokens for each text."""
    ours, theirs = (_speed_of(turns.median(side), case.work) for side in ("adalink", "peft"))
    return Finding(part=part, what=what, ratios=turns.ratios("peft", "adalink"), target=case.faster, detail=f"{ours} against {theirs}")


def _speed_of(seconds: float, work: Work) -> str:
    """Rows as the peer reads them are what both sides are paid for."""
    n_texts = work.n_texts * work.n_images
    tokens = n_texts * (work.n_patches + work.n_prompt + work.n_target)
    return f"{1000 * seconds / n_texts:.1f} ms a text ({tokens / seconds:.0f} tokens/s)"


def _memory(bench: Bench, shape: Shape, case: Case, part: str = "training") -> Finding:
    ours, theirs = (needs(side, shape, bench.machine, case.work, "lora") for side in ("adalink", "peft"))
    return Finding(
        part=part,
        what=f"{shape.name}, lora, {case.work.n_patches} image tokens, captions: smaller than peft",
        ratios=(theirs.mib / ours.mib,),
        target=case.smaller,
        detail=f"{ours.mib:.0f} MiB against {theirs.mib:.0f} MiB above the loaded model",
    )


# ----------------------------------------
# A training step on cached features, against encoding the image of every row.


TOLERANCE = 1e-3  # features are cached in float16


def features(bench: Bench) -> Iterator[Finding]:
    """Each encoder with each language model. Raises ConfigError without peft."""
    check_peft()
    for name, pixels, case in bench.sizes.encoders:
        for shape in bench.sizes.models:
            yield _end_to_end(bench, shape, drawn_encoder(name, pixels, bench.machine), case)


def drawn_encoder(name: str, pixels: int, machine: Machine) -> VisionTower:
    """A timm encoder with drawn weights, for images of so many pixels a side."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0, img_size=pixels).to(machine.device, machine.dtype)
    return VisionTower(
        Loaded(encoder=TimmEncoder(model), preprocess=Preprocess(transform=lambda image: torch.zeros(3, pixels, pixels))), name=name
    )


def _end_to_end(bench: Bench, shape: Shape, tower: VisionTower, case: Case) -> Finding:
    work, machine = case.work, bench.machine
    side = tower.preprocess.transform(None).shape[-1]  # type: ignore[arg-type]  # it looks at no image
    pixels = torch.randn(work.n_images, 3, side, side, generator=torch.Generator().manual_seed(0)).to(machine.device, machine.dtype)
    model = our_model(shape, machine, tower, "lora")
    table = PatchTable(model.encode(pixels).to("cpu", torch.float16), {})
    per_row = pixels.repeat_interleave(work.n_texts, 0)

    def retained() -> Tensor:
        return torch.stack([value for i in range(len(table)) if isinstance(value := table[i], Tensor)]).to(machine.device, machine.dtype)

    def every_row() -> Tensor:
        with torch.no_grad():
            return tower(per_row).patches

    sides = {"adalink": our_step(model, work, retained), "peft": their_step(model, shape, machine, work, every_row, "lora")}
    turns = alternate(sides, bench.repetitions, machine.device, machine.dtype, max(TOLERANCE, 2e-2 * (machine.dtype.itemsize < 4)))
    what = f"{shape.name}, {tower.name}, {work.n_patches} image tokens: cached features, end to end, faster than an encoder for every row"
    return against_peft("features", what, turns, case)


# ----------------------------------------
# What adapters cost: AdaLink on a forward pass, eight adapters in one batch, and a whole training step beside bare matrix products.


N_ADAPTERS = 8
COST, MIXED, SHARE = 1.02, 1.05, 0.75
MORE = 3  # turns for a difference of a few percent
ADALINK: Mapping[str, Method] = {"adalink": AdaLink(rank=16, modalities=("image", "text"))}


def adapters(bench: Bench) -> Iterator[Finding]:
    """On the last language model: small differences on images of the first size and in more turns, the step on those of the last."""
    shape, first, last = bench.sizes.models[-1], bench.sizes.captions[0].work, bench.sizes.captions[-1].work
    yield _forward(bench, shape, first)
    yield _mixed(bench, shape, first)
    yield _share(bench, shape, last)


def _forward(bench: Bench, shape: Shape, work: Work) -> Finding:
    """The head reads one token: what it costs would hide what the edits do."""
    machine = bench.machine
    plain: Any = language(shape, machine).model
    ids, domain = _rows(work, machine, work.n_texts)
    adapted = _adapted(shape, machine, 1)
    token_map = TokenMap(domain, torch.zeros(len(ids), dtype=torch.int64, device=machine.device), serving=frozenset({0}))
    what = f"{shape.name}: a forward pass with AdaLink on image and text, times the frozen model's"
    return _cost(bench, what, COST, ids, lambda: adapted(ids, token_map), lambda: _first(plain, ids))


def _mixed(bench: Bench, shape: Shape, work: Work) -> Finding:
    machine = bench.machine
    ids, domain = _rows(work, machine, N_ADAPTERS)
    adapted = _adapted(shape, machine, N_ADAPTERS)
    every = TokenMap(domain, torch.arange(N_ADAPTERS, device=machine.device), serving=frozenset(range(N_ADAPTERS)))
    one = TokenMap(domain, torch.zeros_like(every.row), serving=frozenset({0}))
    what = f"{shape.name}: a batch that mixes {N_ADAPTERS} AdaLinks, times a batch with one"
    return _cost(bench, what, MIXED, ids, lambda: adapted(ids, every), lambda: adapted(ids, one))


def _cost(bench: Bench, what: str, target: float, ids: Tensor, costly: Callable[[], float], plain: Callable[[], float]) -> Finding:
    """How many times as long the costly side takes on rows of tokens, which is at most the target."""
    with torch.no_grad():
        turns = alternate({"costly": costly, "plain": plain}, MORE * bench.repetitions, bench.machine.device, bench.machine.dtype)
    ms = f"{1000 * turns.median('costly'):.0f} ms against {1000 * turns.median('plain'):.0f} ms"
    return Finding(
        part="adapters",
        what=what,
        ratios=turns.ratios("costly", "plain"),
        target=target,
        sense="at most",
        detail=f"{ms}, {len(ids)} rows of {ids.shape[1]} tokens",
    )


def _share(bench: Bench, shape: Shape, work: Work) -> Finding:
    """The products of the frozen weights alone are counted, forward and for the gradient of their inputs; attention is not."""
    machine = bench.machine
    model = composed(shape, machine, drawn_tower(work.n_patches), {"bridge": Bridge(kind="linear", norm="none"), **ADALINK})
    features = work.features(machine)
    batch = as_batch(encoded(model, work), features, arrange_of(model))
    operations = frozen_operations(model, batch)
    side = max(work.n_patches, 16) * 8
    left, right = torch.randn(2, side, side, device=machine.device, dtype=machine.dtype)

    def product() -> float:
        torch.mm(left, right)
        return 0.0

    step = our_step(model, work, lambda: features)

    def stepped() -> float:
        step()
        return 0.0

    turns = alternate({"step": stepped, "product": product}, bench.repetitions, machine.device, machine.dtype)
    rates = [operations / seconds for seconds in turns.seconds["step"]]
    own = [2 * side**3 / seconds for seconds in turns.seconds["product"]]
    return Finding(
        part="adapters",
        what=f"{shape.name}, {work.n_patches} image tokens: a training step's rate on the frozen weights, of the rate of one matrix product",
        ratios=tuple(rate / of for rate, of in zip(rates, own, strict=True)),
        target=SHARE,
        detail=f"{statistics.median(rates) / 1e9:.1f} of {statistics.median(own) / 1e9:.1f} GFLOP/s, {operations / 1e9:.0f} GFLOP a step",
    )


def frozen_operations(model: VisionLanguageModel, batch: Batch) -> float:
    """Floating-point operations of the frozen weights in a training step: forward, and for the gradient of their inputs. Attention is not counted."""
    config = model.language.model.config
    n_layers = sum(linear.n_in * linear.n_out for linear in model.adapted.anatomy.linears)
    return 4 * (batch.ids.numel() * n_layers + batch.n_targets * config.hidden_size * config.vocab_size)


def _adapted(shape: Shape, machine: Machine, n_adapters: int) -> Callable[[Tensor, TokenMap], float]:
    """A forward pass of a model with so many AdaLinks attached."""
    model: Any = language(shape, machine).model
    anatomy = Anatomy.read(model)
    attachment = attach(model, *(Adapter(ADALINK, anatomy).to(machine.device) for _ in range(n_adapters)), anatomy=anatomy)

    def forward(ids: Tensor, token_map: TokenMap) -> float:
        with attachment.bind(token_map):
            return _first(model, ids)

    return forward


def _rows(work: Work, machine: Machine, n_rows: int) -> tuple[Tensor, Tensor]:
    """ids and domains of whole rows: an image, then a text."""
    length = work.n_patches + work.n_prompt + work.n_target
    domain = torch.full((n_rows, length), TEXT, device=machine.device)
    domain[:, : work.n_patches] = IMAGE
    return torch.randint(4, 100, (n_rows, length), device=machine.device), domain


def _first(model: Any, ids: Tensor) -> float:
    return float(model(ids, logits_to_keep=1, use_cache=False).logits[0, -1, 0])


# ----------------------------------------
# Answering five questions about an image, which is read once, against one prompt with the image for each question.


N_QUESTION = 12
# New tokens, beams, and the target at 256 image tokens.
ASKED = ((12, 1, 1.7), (3, 1, 2.6), (12, 3, 1.5))


def generation(bench: Bench) -> Iterator[Finding]:
    """On the first language model, with every size of images."""
    shape, machine = bench.sizes.models[0], bench.machine
    for case in bench.sizes.captions:
        work = Work(n_patches=case.work.n_patches, n_prompt=N_QUESTION)
        methods: dict[str, Method] = {
            "bridge": Bridge(kind="linear", norm="none"),
            "adalink": AdaLink(rank=16, modalities=("image", "text")),
        }
        model = composed(shape, machine, drawn_tower(work.n_patches), methods)
        batch = _questions(model, work, machine)
        for n_new, n_beams, target in ASKED:
            settings = GenerationSettings(max_new_tokens=n_new, num_beams=n_beams)
            sides = {"adalink": _written(model, batch, settings), "transformers": _plain(model, batch, settings)}
            turns = alternate(sides, bench.repetitions, machine.device, machine.dtype, 0.0)
            yield Finding(
                part="generation",
                what=f"{shape.name}, {work.n_patches} image tokens, {work.n_texts} questions, {n_new} new tokens, {_beams(n_beams)}: faster than a prompt each",
                ratios=turns.ratios("transformers", "adalink"),
                target=target if work.n_patches == 256 else None,
                detail=f"{1000 * turns.median('adalink'):.0f} ms against {1000 * turns.median('transformers'):.0f} ms, the same tokens",
            )


def _questions(model: VisionLanguageModel, work: Work, machine: Machine) -> Batch:
    encoder, vocabulary = model.row_encoder(), model.language.model.config.vocab_size
    rows = [encoder.prompt(text.question) for texts in work.texts(vocabulary) for text in texts]
    batch = collate(rows, [0] * len(rows), work.features(machine), kind="patches", side="left", pad_id=PAD_ID)
    return batch.to(machine.device)


def _written(model: VisionLanguageModel, batch: Batch, settings: GenerationSettings) -> Callable[[], float]:
    return lambda: _as_number(model.generate_batch(batch, settings))


def _plain(model: VisionLanguageModel, batch: Batch, settings: GenerationSettings) -> Callable[[], float]:
    """transformers' own generation of the adapted model."""

    @torch.no_grad()
    def generate() -> float:
        with model.adapted.attachment.bind(model.token_map(batch)):
            ids = run_generation(model.language, batch, settings)
        texts = model.language.tokenizer.batch_decode(ids[:, batch.ids.shape[1] :], skip_special_tokens=True)
        return _as_number([text.strip() for text in texts])

    return generate


def _as_number(texts: list[str]) -> float:
    """Equal for equal texts."""
    return float(crc32("\n".join(texts).encode()))


def _beams(n: int) -> str:
    return "greedy" if n == 1 else f"{n} beams"


# ----------------------------------------
# What the repository's own benchmark scripts measure, in alternated repetitions: reading shards, and the scorers.
#
# The scripts lie in tests/benchmarks and do not travel with the installed package.


FOLDER = Path(__file__).parents[2] / "tests" / "benchmarks"
CPU = torch.device("cpu")


def shards(bench: Bench) -> Iterator[Finding]:
    """Samples per processor second from shards in one process, against webdataset's own pipeline. Raises ConfigError outside the repository."""
    script = _script("bench_shards", "shards")
    for name, kind, decode, batch_size, n, target in (
        ("records of 9 KiB", script.Records, script.as_record, 64, bench.sizes.n_records, 5.0),
        ("JPEGs of 640 x 480", script.ReadImages, script.as_image, 16, bench.sizes.n_images, 1.0),
    ):
        with tempfile.TemporaryDirectory() as folder:
            source = kind(n, Path(folder) / "files")
            script.write_shards(source, Path(folder) / "shards", samples_per_shard=n // 4)
            readers = script.readers_of(Path(folder), source, decode, batch_size, 0)
            taken: dict[str, list[float]] = {"adalink": [], "webdataset": []}
            for turn in range(bench.repetitions + 1):
                for side in list(taken)[:: -1 if turn % 2 else 1]:
                    taken[side].append(script.one_pass(readers[side](), n)[1])
        rates = {side: 1 / statistics.median(seconds[1:]) for side, seconds in taken.items()}
        yield Finding(
            part="shards",
            what=f"{name} from shards, one process: samples per second, times webdataset's",
            ratios=tuple(theirs / own for theirs, own in zip(taken["webdataset"][1:], taken["adalink"][1:], strict=True)),
            target=target,
            detail=f"{rates['adalink']:.0f} against {rates['webdataset']:.0f} samples/s",
        )


def metrics(bench: Bench) -> Iterator[Finding]:
    """Seconds of the metrics, against the official programs'; captions only where those are installed. Raises ConfigError outside the repository."""
    script = _script("bench_metrics", "metrics")
    script.N_QUESTIONS, script.N_CAPTIONS = bench.sizes.n_answers, bench.sizes.n_captions
    given, rows, graded = script.answer_rows()
    what = f"{len(given):,} answers scored: faster than the official algorithm in plain Python"
    yield _scored(bench, what, lambda: script.ours_answers(given, graded), lambda: float(script.evaluate(given, rows)["overall"]))
    what = f"{bench.sizes.n_captions:,} captions, words and CIDEr: faster than pycocoevalcap"
    if shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None:
        yield Finding(part="metrics", what=what, ratios=(), detail="not measured: it needs Java and pip install 'adalink[coco]'")
        return
    hypotheses, references = script.caption_corpus(None)
    theirs = partial(script.official_captions, hypotheses, references)
    yield _scored(bench, what, partial(script.ours_captions, hypotheses, references), theirs, time.perf_counter)


def _scored(bench: Bench, what: str, ours: Any, theirs: Any, now: Callable[[], float] | None = None) -> Finding:
    turns = alternate({"adalink": ours, "official": theirs}, bench.repetitions, CPU, torch.float64, 1e-9, now)
    return Finding(
        part="metrics",
        what=what,
        ratios=turns.ratios("official", "adalink"),
        detail=f"{turns.median('adalink'):.2f} s against {turns.median('official'):.2f} s",
    )


def _script(name: str, part: str) -> Any:
    if not (FOLDER / f"{name}.py").is_file():
        raise ConfigError(
            f"the part {part} runs tests/benchmarks/{name}.py, which the installed package does not hold: run it in a clone of the repository"
        )
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # the scripts import each other
    return importlib.import_module(name)
