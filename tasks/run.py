"""A run: compose, train, evaluate, report. What `adalink train` and `adalink evaluate` do."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from adalink.atomic import write_whole
from adalink.errors import ConfigError
from multimodal.bad_samples import BadSamples
from multimodal.batches import Batches
from multimodal.learner import mean_loss
from multimodal.loader import Texts
from multimodal.model import VisionLanguageModel
from multimodal.processes import process_state
from multimodal.run_log import VAL_LOSS
from multimodal.trackers import Shown
from multimodal.train import check_training, train
from multimodal.trained import TrainedParts
from tasks.compose import load_adapted
from tasks.config import RunConfig
from tasks.data import DataConfig, Opened
from tasks.evaluate import Pictures, Predictions, is_graded, predict, read_pictures
from tasks.features import features_to_learn, features_to_show
from tasks.new_model import new_model
from tasks.run_folder import changed_config, refuse_taken, run_folder
from tasks.run_metrics import write_card_figures, write_metrics
from tasks.run_report import write_run_report
from tasks.sameness import told_sameness
from tasks.shown import shown_samples
from tasks.submission import Submission, refuse_gaps, write_submission
from tasks.task import BLIND, TRAINED, UNTRAINED, Score, Task

__all__ = ["Evaluation", "evaluate_run", "is_main", "train_run"]


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
