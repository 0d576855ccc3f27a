"""Self-training: an adapter trained on a few labelled images writes the texts of many unlabelled ones, and the next one learns from both.

LiST (Wang et al. 2022, arXiv 2110.06274), for texts that are written. A session:

    teacher    the adapter of the session before; of session 0, which learns from the labelled images alone
    labels     what the teacher writes about the unlabelled images, those that it is confident of
    weights    1 for each of these texts; or, as the paper has it, max(0, <gradient of its loss, gradient of the loss of held-out labelled images>), scaled to
               a mean of 1
    student    a new adapter, trained on the labelled images and the weighted texts; the next teacher

Each session is an ordinary run folder. What it learned from is a table beside it, one line a text, to look at and to edit before the next session.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from adalink import AdaptedModel
from adalink.errors import ConfigError, DataError
from adalink.files import write_whole
from multimodal.batches.collate import collate, stacked
from multimodal.data.feature_cache.encode import encode_all
from multimodal.data.images.decode import read_image_bytes
from multimodal.data.loader import Texts
from multimodal.model import VisionLanguageModel
from multimodal.processes import process_state
from multimodal.progress import progress
from multimodal.sample import BadSample, Sample, SampleSource, counted
from multimodal.template import Text
from tasks.data.sources import Chosen, DataConfig, Opened
from tasks.evaluation.compare import ANSWER_IS_RIGHT
from tasks.evaluation.evaluate import ReadImages, predict, read_images
from tasks.runs.compose import load_adapted, log
from tasks.runs.config import Data, RunConfig, SelfTraining
from tasks.runs.run import refuse_taken, train_run
from tasks.task import TRAINED, Task

__all__ = ["Guess", "confident_at", "meta_weights", "selftrain_run"]

FEWEST = 8  # labelled images
MOST_ALIKE = 0.01  # of all captions; one that more images have is a habit of the teacher's, and no description
SESSIONS_FILE = "sessions.json"


@dataclass(frozen=True, kw_only=True)
class Guess:
    """What a teacher wrote about an image: the sample's index, the item that it answers, and its loss, float [], in nats over n tokens."""

    index: int
    item: int
    question: str
    text: str
    loss: float
    n_tokens: int

    def confidence(self, task: str) -> float:
        """Of an answer the probability, of a caption the mean log probability of a token: long captions are not less sure for their length."""
        return float(torch.tensor(-self.loss).exp()) if task == "vqa" else -self.loss / self.n_tokens


def meta_weights(dots: Tensor, *, rate: float = 1.0, damping: float = 0.0) -> Tensor:
    """float [n], with the sum 1 (0 where no text helps): what each of n texts is worth to the labelled ones after one step of gradient descent.

    Look-aheads on several labelled batches are summed before what is below 0 is cut off, as the authors do.

    dots     float [steps, n]: for each look-ahead, the gradient of a text's loss times the gradient of the labelled loss
    rate     of the look-ahead's step, which cancels unless damping is given
    damping  added to the sum, as the authors' code does (1e-6)
    """
    worth = (rate * dots.sum(0)).clamp(min=0)
    total = worth.sum() + damping
    return worth / total if total > 0 else worth


def confident_at(confidences: Sequence[float], right: Sequence[bool], precision: float) -> float:
    """The lowest confidence from which on at least this share is right; infinite where there is none."""
    found, n_right = float("inf"), 0
    for number, (confidence, is_right) in enumerate(sorted(zip(confidences, right, strict=True), reverse=True), start=1):
        n_right += is_right
        found = confidence if n_right >= precision * number else found
    return found


def selftrain_run(config: RunConfig, unlabelled: DataConfig, settings: SelfTraining, text_of: Callable[[RunConfig], str]) -> list[dict[str, Any]]:
    """Train session 0 on the labelled images, then the others; what each reached comes back, and stands in sessions.json.

    text_of: the text of a session's config.yaml. A folder in which sessions are finished, or begun, is gone on with.

    Raises ConfigError for settings that no session can have, DataError for data that cannot be learned from so.
    """
    _check(config)
    assert config.out is not None
    assert config.data.train is not None
    out, task = config.out, config.chosen_task()
    refuse_taken(out, resume=(out / "held_out.jsonl").exists())
    labelled, bare = config.data.train.open(), unlabelled.open()
    bare, seen = _without_labelled(bare, labelled)
    _refuse_data(labelled, bare, seen, config.data.val.open(), task)
    out.mkdir(parents=True, exist_ok=True)
    _write_shots(labelled.source, settings, config, out)
    reached: list[dict[str, Any]] = []
    for session in range(settings.sessions + 1):
        if session and not _labels(out, session).exists():
            _write_labels(config, bare, settings, session)
        own = _session(config, session, settings.share)
        if not (out / str(session) / "metrics.json").exists():
            train_run(own, text_of(own), resume=(out / str(session)).exists(), texts_of=Weighted.reading(_labels(out, session)))
            process_state().wait_for_everyone()  # one process writes the run's metrics
        reached.append(_reached(config, session, out))
        write_whole(out / SESSIONS_FILE, (json.dumps(reached, indent=1) + "\n").encode())
        if best_of(reached) + settings.patience <= session < settings.sessions:
            log(f"{settings.patience} sessions were no better on the held-out images than session {best_of(reached)}: the training ends")
            break
    return reached


def best_of(reached: Sequence[Mapping[str, Any]]) -> int:
    """The session with the highest metric on the held-out labelled images, the earliest of several; the teacher of session 0 may be it."""
    return max(range(len(reached)), key=lambda session: (reached[session]["held_out"], -session))


def _check(config: RunConfig) -> None:
    if config.out is None or config.data.train is None:
        raise ConfigError("self-training needs `out`, a folder for all sessions, and `data.train`, the labelled images: give both")
    if config.n_answers or config.train.teachers.folders is not None:
        name = "vqa.answers" if config.n_answers else "train.teachers"
        raise ConfigError(f"{name} is given, and self-training learns texts that a teacher writes: leave it out")


def _refuse_data(labelled: Opened, bare: Opened, seen: Sequence[str | None], val: Opened, task: Task) -> None:
    """Raise DataError for too few labels, nothing to ask, and images that are evaluated on among those that are learned from.

    seen: the digest of each unlabelled image
    """
    if len(labelled.source) < FEWEST:
        raise DataError(f"self-training needs {FEWEST} labelled images or more, and data.train has {len(labelled.source)}: label some more")
    if not any(task.asked(bare.source[i]) for i in range(len(bare.source))):
        raise DataError("the unlabelled data has no question, and the task vqa needs them: give images with questions, or the task captioning")
    evaluated = {*_digests(val.source)} - {None}
    both = [bare.source[i].key for i, digest in enumerate(seen) if digest in evaluated]
    if both:
        raise DataError(f"{len(both)} of the unlabelled images are in data.val too (first: {both[0]}), which then would measure nothing: leave them out")


def _without_labelled(bare: Opened, labelled: Opened) -> tuple[Opened, list[str | None]]:
    """The unlabelled images without those that have labels already, and the digest of each. Raises DataError where none is left."""
    known, every = {*_digests(labelled.source)}, _digests(bare.source)
    left = [i for i, digest in enumerate(every) if digest not in known]
    if not left:
        raise DataError("every unlabelled image is in data.train too, so there is nothing to label: give other images")
    if len(left) == len(bare.source):
        return bare, every
    log(f"{counted(len(bare.source) - len(left), 'unlabelled image')} in data.train too, and left out")
    return replace(bare, source=Chosen(bare.source, left)), [every[i] for i in left]


def _bytes(sample: Sample) -> bytes | None:
    """The image as its file has it; None where it cannot be read."""
    if sample.media is None:
        return None
    try:
        return read_image_bytes(sample.media) if not isinstance(sample.media, Image.Image) else _png(sample.media)
    except DataError:
        return None


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _digests(source: SampleSource) -> list[str | None]:
    """Of each image; None where it cannot be read."""
    files = (_bytes(source[i]) for i in range(len(source)))
    return [None if data is None else hashlib.sha256(data).hexdigest() for data in files]


# ----------------------------------------
# The files of all sessions: tables of labelled images, of which a part is held out, and the texts of each session.


def _labels(out: Path, session: int) -> Path:
    return out / f"labels_{session}.jsonl"


def _write_shots(source: SampleSource, settings: SelfTraining, config: RunConfig, out: Path) -> None:
    """shots.jsonl and held_out.jsonl: which image is in which is drawn by the run's seed."""
    if (out / "held_out.jsonl").exists():
        return
    order = random.Random(config.train.seed).sample(range(len(source)), len(source))
    n_held = max(2, round(settings.held_out * len(source)))
    parts = {"shots.jsonl": sorted(order[n_held:]), "held_out.jsonl": sorted(order[:n_held])}
    for name, indices in parts.items():
        rows = [row for index in indices for row in _rows(source[index], _image_file(source[index], out), config.task)]
        if not rows:
            raise DataError(f"none of the {len(indices)} labelled images for {name} has an image and a text: give data.train with {config.task} texts")
        _write_lines(out / name, rows)


def _image_file(sample: Sample, out: Path) -> str | None:
    """The file of a sample's image in the folder `images`, beside the tables: its own by another name, or a new one. None where it cannot be read."""
    data = _bytes(sample)
    if data is None:
        return None
    file = out / "images" / f"{hashlib.sha256(data).hexdigest()[:16]}{Path(sample.file).suffix or '.png'}"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        try:
            os.link(sample.media if isinstance(sample.media, (str, Path)) else "", file)
        except OSError:  # another disk, or no file
            write_whole(file, data)
    return f"images/{file.name}"


def _rows(sample: Sample, image: str | None, task: str) -> Iterator[dict[str, Any]]:
    if image is None:
        return
    if task == "captioning":
        if sample.captions:
            yield {"image": image, "image_id": sample.image_id, "captions": list(sample.captions)}
        return
    for one in sample.questions:
        if one.answers:
            kinds = {"question_type": one.question_type, "answer_type": one.answer_type}
            yield {"image": image, "image_id": sample.image_id, "question_id": one.question_id, "question": one.text, "answers": list(one.answers), **kinds}


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _session(config: RunConfig, session: int, share: float) -> RunConfig:
    """The run of a session: it learns from the labelled images, and from the teacher's texts where there are some."""
    assert config.out is not None
    shots, path, own = config.out / "shots.jsonl", _labels(config.out, session), round(100 * share)
    has_texts = path.exists() and bool(path.read_text(encoding="utf-8").strip())
    data = DataConfig(mix={str(shots): 100 - own, str(path): own}) if has_texts and own else DataConfig(path=shots)
    return replace(config, out=config.out / str(session), data=Data(val=config.data.val, train=data))


class Weighted:
    """A task's texts with the weights of a table of labels. Pickles, for worker processes."""

    def __init__(self, texts: Texts, weights: Mapping[tuple[str, str], float]) -> None:
        self.texts, self.weights = texts, weights

    @classmethod
    def reading(cls, path: Path) -> Callable[[Texts], Texts]:
        """What gives a task's texts the weights that the file says; without one they stay as they are."""
        if not path.exists():
            return lambda texts: texts
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        weights = {(Path(row["image"]).name, row.get("question", "")): float(row["weight"]) for row in rows}
        return lambda texts: cls(texts, weights)

    def __call__(self, sample: Sample, rng: random.Random) -> Sequence[Text]:
        """As `multimodal.data.loader.Texts`."""
        return [replace(text, weight=self.weights.get((sample.file, text.question), 1.0)) for text in self.texts(sample, rng)]


# ----------------------------------------
# What a teacher writes, how sure it is, and what each text is worth to the held-out images.


def _write_labels(config: RunConfig, bare: Opened, settings: SelfTraining, session: int) -> None:
    """The texts that a session learns from, with confidence and weight, in labels_SESSION.jsonl; the others in left_out_SESSION.jsonl."""
    assert config.out is not None
    teacher = config.out / str(session - 1) / "adapter"
    model, _ = load_adapted(teacher, **vars(config.parts))
    task, digest = config.chosen_task(), AdaptedModel.read_config(teacher).weights
    images = _read(model, bare, config)
    found = _guesses(model, images, task, config)
    limit = _limit(model, found, task, settings, config)
    chosen = [one for one in found if one.confidence(task.name) >= limit]
    if task.name == "captioning" and settings.weights != "none":
        chosen = _unlike(chosen, len(found))
    worth = dict.fromkeys(chosen, 1.0)
    if settings.weights == "meta" and chosen:
        worth = _worth(model, images, chosen, _read(model, DataConfig(path=config.out / "held_out.jsonl").open(), config), task)
    rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for one in found:
        named = {"image": _image_file(images.source[one.index], config.out), "image_id": images.source[one.index].image_id}
        text = {"caption": one.text} if task.name == "captioning" else {"question_id": one.item, "question": one.question, "answers": [one.text]}
        weight = worth.get(one, 0.0)
        about = {"confidence": one.confidence(task.name), "weight": weight, "session": session, "teacher": digest}
        rows[weight > 0].append({**named, **text, **about})
    _write_lines(config.out / f"left_out_{session}.jsonl", rows[False])
    _write_lines(_labels(config.out, session), rows[True])
    n = len(rows[True])
    worthless = f"; {len(chosen) - n:,} confident ones are worth nothing" if len(chosen) > n else ""
    log(f"session {session}: {n:,} of {counted(len(found), 'text')} of the teacher are learned from{worthless}")


def _read(model: VisionLanguageModel, opened: Opened, config: RunConfig) -> ReadImages:
    return read_images(opened, encode_all(model, opened.source, workers=config.train.workers, dtype=config.features_dtype))


def _guesses(model: VisionLanguageModel, images: ReadImages, task: Task, config: RunConfig) -> list[Guess]:
    """What the model writes about every image, without empty texts, with its own loss on it."""
    written = predict(model, images.source, task, images.patches, settings=config.generation).texts
    found = []
    for index in progress(range(len(images.source)), "how sure the teacher is"):
        asked = [one for one in task.asked(images.source[index]) if written.get(one.item, "").strip()]
        texts = [replace(one.text, target=written[one.item]) for one in asked]
        losses, lengths = _losses(model, images, index, texts)
        found += [
            Guess(index=index, item=one.item, question=one.question, text=written[one.item], loss=float(loss), n_tokens=n)
            for one, loss, n in zip(asked, losses.detach(), lengths, strict=True)
        ]
    return found


def _losses(model: VisionLanguageModel, images: ReadImages, index: int, texts: Sequence[Text]) -> tuple[Tensor, list[int]]:
    """float [n]: the summed loss of each text about an image, a row each; and how many tokens each has."""
    features, encoder = images.patches[index], model.row_encoder()
    if not texts or isinstance(features, BadSample):
        return torch.zeros(0), []
    rows = [encoder.row(text, features if encoder.reads_images else None) for text in texts]
    pad = model.language.tokenizer.pad_token_id
    batch = collate(rows, [0] * len(rows), stacked([features]), kind=images.patches.kind, side="right", pad_id=pad).to(model.device)
    return model.language_loss.of_rows(batch, model.token_map(batch)), [len(row.target) for row in rows]


def _limit(model: VisionLanguageModel, found: Sequence[Guess], task: Task, settings: SelfTraining, config: RunConfig) -> float:
    """The confidence from which on a text is learned from: of answers where enough of the held-out ones are right, of captions that of the best share."""
    assert config.out is not None
    if settings.weights == "none" or not found:
        return float("-inf")
    sure = sorted((one.confidence(task.name) for one in found), reverse=True)
    n_best = int(settings.keep * len(sure))
    at_best = sure[n_best - 1] if n_best else float("inf")
    if task.name == "captioning" or not n_best:
        return at_best
    held = _read(model, DataConfig(path=config.out / "held_out.jsonl").open(), config)
    own = _guesses(model, held, task, config)
    items = task.score({one.item: one.text for one in own}, held.source).items
    surely = confident_at([one.confidence(task.name) for one in own], [items[one.item] >= ANSWER_IS_RIGHT for one in own], settings.precision)
    if surely == float("inf"):
        log(
            f"of the held-out answers {100 * settings.precision:g} % are right at no confidence, so no answer of the teacher is learned from: lower "
            "selftrain.precision, or label more images"
        )
    return max(at_best, surely)


def _unlike(found: Sequence[Guess], n_all: int) -> list[Guess]:
    """Without captions that more than a hundredth of all images have."""
    counts = Counter(one.text for one in found)
    return [one for one in found if counts[one.text] <= max(1, MOST_ALIKE * n_all)]


def _worth(model: VisionLanguageModel, images: ReadImages, chosen: Sequence[Guess], held: ReadImages, task: Task) -> dict[Guess, float]:
    """The weight of each text, with a mean of 1 over those that are worth something; all zero where none is."""
    parameters = [one for one in model.adapted.active_adapter().parameters() if one.requires_grad]
    wanted = torch.zeros(sum(one.numel() for one in parameters), dtype=torch.float64)
    rng = random.Random(0)
    for index in range(len(held.source)):
        losses, _ = _losses(model, held, index, task.texts(held.source[index], rng))
        if len(losses):
            wanted += _gradient(losses.sum(), parameters)
    about: dict[int, list[Guess]] = {}
    for one in chosen:
        about.setdefault(one.index, []).append(one)
    dots: dict[Guess, float] = {}
    for index in progress(sorted(about), "what each text is worth"):
        losses, _ = _losses(model, images, index, [Text(one.question, one.text) for one in about[index]])
        dots |= {one: float(_gradient(loss, parameters, again=True) @ wanted) for one, loss in zip(about[index], losses, strict=True)}
    shares = meta_weights(torch.tensor([[dots[one] for one in chosen]], dtype=torch.float64))
    weights = shares * (shares > 0).sum()
    return dict(zip(chosen, weights.tolist(), strict=True))


def _gradient(loss: Tensor, parameters: Sequence[Tensor], *, again: bool = False) -> Tensor:
    """float64 [P] of the adapter's weights."""
    found = torch.autograd.grad(loss, parameters, retain_graph=again, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double().cpu() for g, p in zip(found, parameters, strict=True)])


def _reached(config: RunConfig, session: int, out: Path) -> dict[str, Any]:
    """What a session's adapter reaches on data.val, and on the held-out labelled images by which sessions are chosen."""
    metrics = json.loads((out / str(session) / "metrics.json").read_bytes())
    task = config.chosen_task()
    model, _ = load_adapted(out / str(session) / "adapter", **vars(config.parts))
    held = _read(model, DataConfig(path=out / "held_out.jsonl").open(), config)
    score = task.score(predict(model, held.source, task, held.patches, settings=config.generation).texts, held.source)
    path = _labels(out, session)
    n_texts = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
    headline = metrics["headline"]
    return {"session": session, "texts": n_texts, "metric": headline, "held_out": score.metrics[score.headline], "val": metrics["rows"][TRAINED][headline]}
