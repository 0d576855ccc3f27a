"""A run: compose, train, evaluate, report. What `adalink train` and `adalink evaluate` do."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml

from adalink.errors import AdalinkError, ConfigError, DataError
from adalink.files import write_whole
from multimodal.bad_samples import BadSamples
from multimodal.data.images.decode import decode_image
from multimodal.data.loader import Batches, Texts
from multimodal.model import TrainedParts, VisionLanguageModel
from multimodal.processes import process_state
from multimodal.sample import SampleSource
from multimodal.training.prepare import mean_loss
from multimodal.training.records import VAL_LOSS, Shown, flat
from multimodal.training.train import check_training, train
from tasks.data.sources import DataConfig, Opened
from tasks.evaluation.evaluate import (
    Pictures,
    Predictions,
    Submission,
    is_graded,
    predict,
    read_pictures,
    refuse_gaps,
    told_sameness,
    write_submission,
)
from tasks.runs.compose import compose, features_to_learn, features_to_show, load_adapted
from tasks.runs.config import RunConfig, chosen_methods
from tasks.runs.results import write_card_figures, write_metrics, write_run_report
from tasks.task import BLIND, TRAINED, UNTRAINED, Score, Task
from tasks.vqa import answer_vocabulary

__all__ = [
    "Evaluation", "changed_config", "evaluate_run", "is_main", "new_model", "refuse_taken", "run_folder", "shown_samples",
    "train_run",
]  # fmt: skip


# ----------------------------------------
# The folder that a run writes into.


def refuse_taken(out: Path, *, resume: bool) -> None:
    """Raises ConfigError where the folder holds something already and is not to be gone on with."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not resume)):
        raise ConfigError(f"the run folder {out} is there already: give another `out`, or --resume to go on with it")


def changed_config(file: Path, config_text: str) -> list[str]:
    """`generation.num_beams 3 -> 1` for each setting of a run's config.yaml that is another now; of those that its checkpoints hold, training tells."""
    try:
        was, now = (flat(yaml.safe_load(text) or {}) for text in (file.read_text(encoding="utf-8"), config_text))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return []  # a process that was killed while it wrote it
    names = [name for name in {**was, **now} if was and not name.startswith(("train.", "methods.", "vision_methods.")) and name != "out"]
    return [f"{name} {was.get(name)} -> {now.get(name)}" for name in names if was.get(name) != now.get(name)]


@contextlib.contextmanager
def run_folder(out: Path) -> Iterator[Path]:
    """The run folder, made if need be; one that was made here and holds no checkpoint is removed where the run fails.

    Raises ConfigError where it cannot be made.
    """
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the run folder {out} cannot be made: {error.strerror}") from None
    try:
        yield out
    except AdalinkError:
        if is_new and not (out / "checkpoints").exists():
            shutil.rmtree(out, ignore_errors=True)  # other processes of the run remove it too
        raise


# ----------------------------------------
# The model that a run trains, made of its config, and what it learns of a sample.


def new_model(config: RunConfig, source: SampleSource) -> tuple[VisionLanguageModel, Texts]:
    """The composed model with new adapters on the language model and, where the config says so, on the encoder; and the texts it learns.

    source: the training data, whose most frequent answers a model that chooses among answers gets. Raises ConfigError and DataError as
    `compose`, `add_adapter` and `answer_vocabulary` do.
    """
    task = config.chosen_task()
    methods = chosen_methods(config.methods)
    model = compose(config.encoder, config.language_model, template=task.template, layer=config.layer, use="read" if config.n_answers else "write")
    model.add_adapter("default", methods)
    if config.encoder_methods:
        model.add_vision_adapter(config.encoder_methods)
    if not config.n_answers:
        return model, task.texts
    vocabulary = answer_vocabulary(config.vqa, source)
    model.add_answer_head(vocabulary.answers)
    return model, vocabulary.texts


# ----------------------------------------
# The pictures that a tracker shows at each measurement.


N_SHOWN = 6


def shown_samples(source: SampleSource, task: Task, texts: Mapping[int, str]) -> Sequence[Shown]:
    """Some pictures, always the same ones and spread over the source, each with the first thing asked and what was said."""
    shown: list[Shown] = []
    for index in range(0, len(source), max(len(source) // N_SHOWN, 1)):
        sample = source[index]
        asked = next((one for one in task.asked(sample) if one.item in texts), None)
        if asked is None or len(shown) == N_SHOWN:
            continue
        try:
            image = decode_image(sample.image)
        except DataError:  # a source that has become unreadable is the evaluation's to report
            continue
        shown.append(Shown(key=sample.key, image=image, said=f"{asked.question} {texts[asked.item]}".strip()))
    return shown


@dataclass(frozen=True)
class Evaluation:
    """The scores of one data set, by what was done to the model; and what was said with its own picture, with a sentence where that is too much alike."""

    scores: Mapping[str, Score]
    predictions: Predictions
    seconds: float
    warning: str


def train_run(config: RunConfig, config_text: str, *, resume: bool = False) -> Evaluation:
    """Train, save, evaluate with and without the right pictures, and write the report into the run folder.

    Raises ConfigError where the config names no run folder or no training data, or the folder is taken.
    """
    if config.out is None or config.data.train is None:
        raise ConfigError("training needs `out`, the run folder, and `data.train`: give both")
    refuse_taken(config.out, resume=resume)  # before the models are loaded, which takes a while
    task = config.chosen_task()
    opened, val = (_opened(data, config) for data in (config.data.train, config.data.val))
    torch.manual_seed(config.train.seed)
    model, texts = new_model(config, opened.source)
    check_training(model, config.train, config.out, resume=resume)  # before an image is read
    if is_main():
        model.print_trainable_parameters()
    with run_folder(config.out) as folder, features_to_learn(model, opened.source, config) as learnt:
        config_file = folder / "config.yaml"
        if not config_file.exists():
            config_file.write_text(config_text)
        elif changed := changed_config(config_file, config_text):
            _say(f"settings that are not those of {config_file}: {'; '.join(changed)}")
        pictures = read_pictures(val, features_to_show(model, val.source, config, "encoding the validation pictures"))
        untrained = _predict(model, pictures, task, config)
        _check_bad(pictures, untrained, config)  # not first after the training
        before = {UNTRAINED: task.score(untrained.texts, pictures.source)}
        _say(before[UNTRAINED].note)
        measurement = _Measurement(model, pictures, task, texts, config)
        trained = train(
            model, opened.source, texts, config.train, folder, resume=resume, patches=learnt, known_bad=opened.problems, measure=measurement.figures,
            judged_by=before[UNTRAINED].headline, samples=measurement.samples,
        )  # fmt: skip
        _say_skipped("training", trained.bad)
        best = "weights of step {}, the best of the run by {} ({:.2f})".format(*trained.best) if trained.best else ""
        if best:
            _say(f"the adapter has the {best}")
        config_file.write_text(config_text)  # of a resumed run first here: one that is refused leaves the old one
        model.save_pretrained(folder / "adapter", task={"task": task.name, "generation": asdict(config.generation)})
        evaluation = _evaluate(model, pictures, task, config, before)
        _write(folder, model, task, config_text, evaluation, pictures)
        if is_main():
            n_items = len(evaluation.predictions.texts)
            write_card_figures(folder / "adapter", evaluation.scores[TRAINED], split=config.data.val.split_name, items=n_items, best=best)
    return evaluation


def evaluate_run(
    config: RunConfig, config_text: str, adapter: Path, out: Path, submission: Submission, *, allow_other_base: bool = False
) -> Evaluation:
    """Evaluate a saved adapter on `data.val`: the official result file, results.json, metrics.json, config.yaml and report.html in `out`.

    Raises DataError where the official result file would have gaps that the submission does not allow.
    """
    task = config.chosen_task()
    model, saved = load_adapted(adapter, encoder=config.encoder, language_model=config.language_model, allow_other_base=allow_other_base)
    if saved["task"] != task.name:
        raise ConfigError(f"the adapter in {adapter} was trained for {saved['task']}, and the config's task is {task.name}: give the config of its run")
    val = config.data.val.open()
    with run_folder(out) as folder:
        pictures = read_pictures(val, features_to_show(model, val.source, config, "encoding the pictures"))
        refuse_gaps(task, val, pictures.source, pictures.bad, submission)
        evaluation = _evaluate(model, pictures, task, config, {})
        if is_main():
            write_whole(folder / "config.yaml", config_text.encode())
        _write(folder, model, task, config_text, evaluation, pictures)
    # Outside: what was generated stays where the official file is refused.
    said = evaluation.predictions
    if is_main():
        print(write_submission(out, task, val, config.data.val.split_name, said.texts, said.bad, submission))
    return evaluation


def _opened(data: DataConfig, config: RunConfig) -> Opened:
    """A data set of which no more samples are known to be bad than the budget allows. Raises BudgetError and DataError."""
    opened = data.open()
    BadSamples(budget=config.train.bad_samples, found=opened.problems).check()
    return opened


def _evaluate(model: VisionLanguageModel, pictures: Pictures, task: Task, config: RunConfig, before: Mapping[str, Score]) -> Evaluation:
    started = time.perf_counter()
    own = _predict(model, pictures, task, config)
    seconds = time.perf_counter() - started
    _say_skipped("evaluation", _check_bad(pictures, own, config))
    said = Predictions(own.texts, (*pictures.bad, *own.bad))
    warning = told_sameness(own.texts.values(), config.generation) if model.head is None else ""
    _say(warning)
    if not before and own.texts and not is_graded(task, pictures.source):
        return Evaluation({}, said, seconds, warning)
    other = _predict(model, pictures, task, config, shift=max(len(pictures.source) // 2, 1))
    scores = {**before, TRAINED: task.score(own.texts, pictures.source), BLIND: task.score(other.texts, pictures.source)}
    note = scores[TRAINED].note
    if not before:
        _say(note)
    return Evaluation(scores, said, seconds, "; ".join(filter(None, (warning, note))))


class _Measurement:
    """What a training asks of the validation data on its way."""

    def __init__(self, model: VisionLanguageModel, pictures: Pictures, task: Task, texts: Texts, config: RunConfig) -> None:
        self._model, self._pictures, self._task, self._texts, self._config = model, pictures, task, texts, config
        self._said: dict[int, str] = {}  # by the last measurement

    def figures(self) -> dict[str, float]:
        """The task's metric, and the loss where there are texts to learn."""
        self._said.update(_predict(self._model, self._pictures, self._task, self._config).texts)
        score = self._task.score(self._said, self._pictures.source)
        loss = mean_loss(self._model, self._batches())
        return {score.headline: score.figures[score.headline], **({} if loss is None else {VAL_LOSS: loss})}

    def samples(self) -> Sequence[Shown]:
        """Some images with what was said about them."""
        return shown_samples(self._pictures.source, self._task, self._said)

    def _batches(self) -> Batches:
        """This process's part of the samples, each once, with what a run would learn from them; the same at each measurement."""
        state, source = process_state(), self._pictures.source
        return self._model.batches(
            source, self._texts, batch_size=self._config.train.batch_size, features=self._pictures.patches, bad_samples=len(source),
            rank=state.process_index, world=state.num_processes,
        )  # fmt: skip


def _predict(model: VisionLanguageModel, pictures: Pictures, task: Task, config: RunConfig, shift: int = 0) -> Predictions:
    return predict(model, pictures.source, task, pictures.patches, settings=config.generation, shift=shift)


def _check_bad(pictures: Pictures, predictions: Predictions, config: RunConfig) -> BadSamples:
    """What could not be asked about; raises BudgetError over the budget."""
    bad = BadSamples(budget=config.train.bad_samples, found=[*pictures.bad, *predictions.bad])
    bad.check()
    return bad


def is_main() -> bool:
    """Whether this process, of those that train together, is the one that writes and prints; every one evaluates, and all find the same."""
    return bool(process_state().is_main_process)


def _say_skipped(what: str, bad: BadSamples) -> None:
    if bad.counts:
        _say(f"skipped in {what}: {bad.summary()}")


def _say(sentence: str) -> None:
    if sentence and is_main():
        print(sentence, file=sys.stderr)


def _write(folder: Path, model: VisionLanguageModel, task: Task, config_text: str, evaluation: Evaluation, pictures: Pictures) -> None:
    if not is_main():
        return
    task.write_results(folder / "results.json", evaluation.predictions.texts)
    said, trained = evaluation.predictions, TrainedParts.of(model).counts()
    write_metrics(
        folder / "metrics.json", task, evaluation.scores, items=len(said.texts), trained=trained, seconds=evaluation.seconds, bad=said.bad
    )  # fmt: skip
    write_run_report(folder, model, task, config_text, evaluation.scores, evaluation.predictions, pictures.source, warning=evaluation.warning)
