"""Routing to adapters by image and question: how often it is right, and what it costs a server and a batch. Each a table of RESULTS.md.

    PYTHONPATH=.:tests/support:tests/tasks/support:tests/benchmarks python tests/benchmarks/studies/route.py right     # scenes: captions, yes/no, number, other
    PYTHONPATH=.:tests/support:tests/tasks/support:tests/benchmarks python tests/benchmarks/studies/route.py photos    # Flickr8k captions against DAQUAR questions
    PYTHONPATH=.:tests/support:tests/tasks/support:tests/benchmarks python tests/benchmarks/studies/route.py mixed     # two trained adapters: by name, routed, mixed
    PYTHONPATH=.:tests/support:tests/tasks/support:tests/benchmarks python tests/benchmarks/studies/route.py batch     # tokens a second of a routed batch and a named one
    PYTHONPATH=.:tests/support:tests/tasks/support:tests/benchmarks python tests/benchmarks/studies/route.py served    # latency and throughput of a server

What routes is made of frozen features alone, so adapters may have random weights here: they change no route and no cost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import httpx
import torch
from bench_serve import NOISE, Load, percentile
from served import photo, serving
from shared import fixtures, shared
from torch import Tensor

from adalink import BASE_NAME, AdaLink, Bridge
from adalink.lifecycle.route import Router, RouteSettings, write_router
from multimodal.batches.collate import stacked
from multimodal.data.feature_cache.encode import encode_all
from multimodal.data.images.decode import decode_image
from multimodal.generation.routing import Routing, RowFeatures
from multimodal.generation.settings import GenerationSettings
from multimodal.model import VisionLanguageModel
from multimodal.sample import Sample, SampleSource
from multimodal.template import Template
from tasks.captioning import Captioning
from tasks.data.sources import DataConfig
from tasks.metrics.bootstrap import Resampling
from tasks.runs.compose import compose
from tasks.scenes.dataset import Scenes
from tasks.vqa import Vqa

KINDS = ("caption", "yes/no", "number", "other")
NAMES = {kind: kind.replace("/", "_") for kind in KINDS}
WORDS = Template(prompt="<image><bos>question: {question} answer:", target="{text}<eos>")


def asked(sample: Sample, kind: str, draw: Random) -> str | None:
    """A question of a kind about a sample, nothing for a caption; None where there is none."""
    if kind == "caption":
        return ""
    found = [question.text for question in sample.questions if kind in (question.answer_type, "any")]
    return draw.choice(found) if found else None


def features(model: VisionLanguageModel, source: SampleSource, kinds: Sequence[str], seed: int) -> dict[str, Tensor]:
    """float64 [B, F] for each kind, one row of each image that has it."""
    table, made, draw = encode_all(model, source, label="encoding", dtype="float32"), RowFeatures(model.language, model.tower), Random(seed)
    rows: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for i, kind in itertools.product(table.usable(), kinds):
        if (question := asked(source[i], kind, draw)) is not None:
            rows[kind].append(made.of(stacked([table[i]]), [0], [question]))  # type: ignore[list-item]
    return {kind: torch.cat(found) for kind, found in rows.items()}


def without_question(rows: Tensor, n_seen: int) -> Tensor:
    """The image half alone."""
    return torch.cat([rows[:, :n_seen], torch.zeros_like(rows[:, n_seen:])], 1)


def scored(router: Router, rows: dict[str, Tensor]) -> str:
    """The share of rows that go to their own adapter, and of those that are taken for like none."""
    routes = {kind: [str(router.route(row)) for row in found] for kind, found in rows.items()}
    own = {kind: 100 * sum(route == kind for route in found) / len(found) for kind, found in routes.items()}
    every = [route for found in routes.values() for route in found]
    n_right = sum(route == kind for kind, found in routes.items() for route in found)
    return f"{100 * n_right / len(every):.1f} of {len(every)} ({', '.join(f'{kind} {share:.1f}' for kind, share in own.items())}); none {100 * every.count(BASE_NAME) / len(every):.1f}"


def strange(model: VisionLanguageModel, n: int) -> Tensor:
    """Rows of random pixels and random words."""
    torch.manual_seed(0)
    draw, made = Random(0), RowFeatures(model.language, model.tower)
    words = [word for word in model.language.tokenizer.get_vocab() if word.strip("Ġ▁").isalpha()]
    images = model.encode(torch.randn(n, *model.tower.preprocess(decode_image(photo(0))).shape))
    return made.of(images, range(n), [" ".join(draw.choices(words, k=draw.randint(2, 10))).replace("Ġ", "").replace("▁", "") for _ in range(n)])


WAYS = {
    "gate": RouteSettings(), "prototypes, 1 center": RouteSettings(by="prototypes", centers=1), "prototypes, 3": RouteSettings(by="prototypes", centers=3),
    "prototypes, 8": RouteSettings(by="prototypes"),
}  # fmt: skip


def table_of(model: VisionLanguageModel, train: dict[str, Tensor], val: dict[str, Tensor]) -> None:
    """Every way to route, with the question and without it, and what becomes of random rows."""
    n_seen, odd = model.tower.width, strange(model, 400)
    for name, settings in WAYS.items():
        started = time.process_time()
        router = Router.fit(train, settings)
        seconds = time.process_time() - started
        refused = 100 * sum(router.route(row) == BASE_NAME for row in odd) / len(odd)
        print(f"{name}: {scored(router, val)}; random rows refused {refused:.1f} %; fitted in {seconds:.1f} s", flush=True)
    blind = Router.fit({kind: without_question(rows, n_seen) for kind, rows in train.items()}, RouteSettings())
    print(f"gate, image half alone: {scored(blind, {kind: without_question(rows, n_seen) for kind, rows in val.items()})}", flush=True)


def right(n_train: int, n_val: int) -> None:
    """Four adapters of the scenes."""
    model = compose("scenes:encoder", "scenes:language", template=WORDS)
    table_of(model, features(model, Scenes(split="train", size=n_train), KINDS, 0), features(model, Scenes(split="val", size=n_val), KINDS, 1))


def photos(n_train: int, n_val: int) -> None:
    """Captions of photographs, questions about rooms: MobileNetV2 and a language model of captions."""
    model = compose(str(shared("parts/mobilenet_v2_1.0_224_hf")), str(shared("parts/captions_opt_3m")), template=WORDS)
    found: dict[str, dict[str, Tensor]] = {}
    for split, n in (("train", n_train), ("val", n_val)):
        flickr, daquar = shared("data/flickr8k"), shared("data/daquar")
        captions = DataConfig(annotations=flickr / f"annotations/captions_{split}.json", images=flickr / "images", limit=n).open().source
        rooms = DataConfig(
            images=daquar / "images", annotations=daquar / f"annotations/daquar_{split}_annotations.json", image_name="image{image_id}.jpg", limit=n,
            questions=daquar / f"annotations/OpenEnded_daquar_{split}_questions.json",
        ).open().source  # fmt: skip
        found[split] = {**features(model, captions, ["caption"], 0), **features(model, rooms, ["any"], 0)}
    table_of(model, found["train"], found["val"])


def mixed(n_train: int, n_val: int) -> None:
    """Trained captioning and VQA adapters of the scenes: the score of each task by name, routed to one, and mixed by the gate's weights.

    The two have templates of their own, which a mixed row cannot choose between, so the rows of each task are worded by its own here.
    """
    model, folder = compose("scenes:encoder", "scenes:language", template=WORDS), fixtures("scenes_adapters")
    tasks: dict[str, Any] = {"captioning": Captioning(), "vqa": Vqa()}
    for name in tasks:
        model.load_adapter(folder / name, name)
    train = Scenes(split="train", size=n_train)
    rows = {"captioning": features(model, train, ["caption"], 0)["caption"], "vqa": features(model, train, ["any"], 0)["any"]}
    model.adapted.add_mixture([*tasks])
    source = Scenes(split="val", size=n_val)
    for name, task in tasks.items():
        asked_all = [(one, source[i].image) for i in range(len(source)) for one in task.asked(source[i])]
        model.adapted.tasks["auto"] = model.adapted.tasks[name]
        for way, settings in (("by name", None), ("routed to one", RouteSettings()), ("mixed", RouteSettings(top=0))):
            model.routing = None if settings is None else Routing(Router.fit(rows, settings), RowFeatures(model.language, model.tower))
            texts: dict[int, str] = {}
            weights = []
            for start in range(0, len(asked_all), 50):
                part = asked_all[start : start + 50]
                images, questions = [decode_image(image) for _, image in part], [one.question for one, _ in part]  # type: ignore[arg-type]
                names: Any = [name] * len(part) if settings is None else model.route(images, questions)
                weights += [] if settings is None else [route.weights.get(name, 0.0) for route in names]
                found = model.generate(images, questions, settings=GenerationSettings(max_new_tokens=30 if name == "captioning" else 8), adapter_names=names)
                texts |= {one.item: text for (one, _), text in zip(part, found, strict=True)}
            score = task.score(texts, source)
            interval = score.intervals(Resampling())[score.headline]
            least = f"; the right one's weight is {min(weights):.4f} at least" if weights else ""
            print(f"{name} {way}: {score.headline} {score.metrics[score.headline]:.2f} ({interval.low:.1f} to {interval.high:.1f}){least}", flush=True)


# ----------------------------------------
# What it costs.


def served_model(n_train: int) -> VisionLanguageModel:
    """Four adapters with random weights, so strong that hardly a text ends by itself, and their router."""
    model = compose("scenes:encoder", "scenes:language", template=WORDS)
    for seed, name in enumerate(NAMES.values()):
        torch.manual_seed(seed)
        adapter = model.add_adapter(name, {"bridge": Bridge(kind="mlp", hidden=256, init_scale=8.0), "adalink": AdaLink(rank=16, modalities=("image", "text"))})
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * NOISE)
    train = features(model, Scenes(split="train", size=n_train), KINDS, 0)
    model.routing = Routing(Router.fit({NAMES[kind]: rows for kind, rows in train.items()}, RouteSettings()), RowFeatures(model.language, model.tower))
    return model


def requests(n_images: int) -> list[tuple[int, str, str]]:
    """Image, question and the adapter that is right, of every kind."""
    draw, source = Random(2), Scenes(split="val", size=1000)
    found = [(i, asked(source[i], kind, draw), NAMES[kind]) for i in range(n_images) for kind in KINDS]
    return [(i, question, name) for i, question, name in found if question is not None]


def ratio(first: Callable[[], float], second: Callable[[], float], rounds: int) -> str:
    """The median of the ratios of what both give in turns, with the least and the greatest."""
    pairs = [(first(), second()) if i % 2 else (second(), first())[::-1] for i in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


def batch(n_train: int, rounds: int, size: int = 32, n_new: int = 32) -> None:
    """`generate` of rows of all kinds, by auto and by name, images and questions given anew."""
    model = served_model(n_train)
    rows = requests(size // 3)[:size]
    images, questions, names = [decode_image(photo(i)) for i, _, _ in rows], [question for _, question, _ in rows], [name for _, _, name in rows]
    settings = GenerationSettings(max_new_tokens=n_new)

    def rate(adapters: Any) -> float:
        started = time.process_time()
        texts = model.generate(images, questions, settings=settings, adapter_names=adapters)
        return sum(len(model.language.tokenizer(text)["input_ids"]) for text in texts) / (time.process_time() - started)

    assert model.generate(images, questions, settings=settings, adapter_names="auto") == model.generate(images, questions, settings=settings, adapter_names=names)
    print(f"{len(rows)} rows of {n_new} tokens, routed / named tokens per second of processor time: {ratio(lambda: rate('auto'), lambda: rate(names), rounds)}")


def served(n_train: int, rounds: int, window: float = 4.0, n_new: int = 32) -> None:
    """One server; requests by auto and by name in turns."""
    model = served_model(n_train)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in NAMES.values():
            model.set_adapter(name)
            model.template = Captioning().template if name == "caption" else WORDS
            model.save_pretrained(root / "members" / name, task={"task": "vqa"})
        assert model.routing is not None
        write_router(root, model.routing.router, {name: root / "members" / name for name in NAMES.values()})
        with serving(root, "--router", root, names=()) as server, httpx.Client(base_url=server.url, timeout=400) as client:
            ids = [client.post("/v1/files", files={"file": ("p.png", photo(i))}).json()["id"] for i in range(32)]
            bodies: dict[str, list[bytes]] = {"auto": [], "named": []}
            for i, question, name in requests(32):
                content = [{"type": "file", "file": {"file_id": ids[i]}}, *([{"type": "text", "text": question}] if question else [])]
                for way, model_name in (("auto", "auto"), ("named", name)):
                    bodies[way].append(json.dumps({"model": model_name, "messages": [{"role": "user", "content": content}], "max_tokens": n_new}).encode())
            for n_clients in (1, 16):
                _turns(server, bodies, n_clients, rounds, window)


def _turns(server: Any, bodies: dict[str, list[bytes]], n_clients: int, rounds: int, window: float) -> None:
    seconds: dict[str, list[float]] = {way: [] for way in bodies}

    cpu: dict[str, list[float]] = {way: [] for way in bodies}

    def rate(way: str) -> float:
        """Tokens a second of the server's processor time: other work on the machine hits that least."""
        load, before = Load(server, bodies[way], n_clients=n_clients), server.cpu_seconds()
        load.start()
        time.sleep(window)
        load.stop()
        assert set(load.statuses) == {"200"}, load.statuses
        seconds[way] += load.seconds
        used = server.cpu_seconds() - before
        cpu[way].append(1000 * used / len(load.seconds))
        return load.tokens / used

    for way in bodies:
        rate(way)  # every image is known from here on
        seconds[way].clear()
    found = ratio(lambda: rate("auto"), lambda: rate("named"), rounds)
    times = {way: [1000 * percentile(values, share) for share in (0.5, 0.99)] for way, values in seconds.items()}
    added = [times["auto"][i] - times["named"][i] for i in range(2)]
    print(f"{n_clients} clients: routed / named tokens per second of the server's processor {found}; p50 {times['named'][0]:.1f} -> {times['auto'][0]:.1f} ms (+{added[0]:.1f}), "
          f"p99 {times['named'][1]:.1f} -> {times['auto'][1]:.1f} ms ({added[1]:+.1f}); {len(seconds['auto'])} and {len(seconds['named'])} requests of "
          f"{statistics.median(cpu['auto']):.1f} and {statistics.median(cpu['named']):.1f} ms of the processor", flush=True)  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("right", "photos", "mixed", "batch", "served"))
    parser.add_argument("--train", type=int, default=1000, help="images of each kind's examples")
    parser.add_argument("--val", type=int, default=500, help="images of the rows that are counted")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    if given.what in ("right", "photos", "mixed"):
        {"right": right, "photos": photos, "mixed": mixed}[given.what](given.train, given.val)
    else:
        {"batch": batch, "served": served}[given.what](given.train, given.rounds)
