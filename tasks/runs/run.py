"""A run: compose, train, evaluate, report. What `adalink train` and `adalink evaluate` do."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import nn

from adalink import AdaptedModel, Method
from adalink.errors import AdalinkError, ConfigError, DataError
from adalink.files import write_whole
from adalink.lifecycle.flat import begin_with, fix_method
from multimodal.data.images.decode import decode_image
from multimodal.data.loader import Batches, Texts
from multimodal.model import TrainedParts, VisionLanguageModel
from multimodal.processes import process_state
from multimodal.sample import BadSamples, DamagedSample, SampleSource
from multimodal.training.prepare import mean_loss
from multimodal.training.records import VAL_LOSS, LoggedSamples, flat
from multimodal.training.train import check_training, train
from tasks.data.sources import Chosen, DataConfig, Opened
from tasks.evaluation.evaluate import (
    Predictions,
    ReadImages,
    Submission,
    degenerate_note,
    is_graded,
    predict,
    read_images,
    refuse_gaps,
    write_submission,
)
from tasks.evaluation.representation import LayerStates, read_representation, representation, write_representation
from tasks.runs.compose import features_to_learn, features_to_log, frozen_model, load_adapted, log
from tasks.runs.config import RunConfig, chosen_methods
from tasks.runs.conversations import refuse_beyond
from tasks.runs.results import write_card_metrics, write_metrics, write_run_report
from tasks.runs.text_task import TextTask, settled
from tasks.runs.texts import cut_note, equip, saved_labels
from tasks.task import BLIND, BLIND_TEXTS, TRAINED, UNTRAINED, Score, Task
from tasks.vqa import AnswerVocabulary, answer_vocabulary

__all__ = [
    "Evaluation", "changed_config", "evaluate_run", "is_main", "new_model", "refuse_taken", "represent_adapter", "run_folder", "logged_samples",
    "train_run",
]  # fmt: skip


# ----------------------------------------
# The folder that a run writes into.


def refuse_taken(out: Path, *, resume: bool) -> None:
    """Raises ConfigError where the folder holds something already and is not to be gone on with."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not resume)):
        raise ConfigError(f"the run folder {out} is there already: give another `out`, or --resume to go on with it")


_SILENT: tuple[object, ...] = (None, False, 0, "", "auto", "none", {})  # values of a setting that changes nothing


def changed_config(file: Path, config_text: str) -> list[str]:
    """`generation.num_beams 3 -> 1` for each setting of a run's config.yaml that is another now; training reports those that its checkpoints hold."""
    try:
        was, now = (flat(yaml.safe_load(text) or {}) for text in (file.read_text(encoding="utf-8"), config_text))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return []  # a process that was killed while it wrote it
    own = ("train.", "methods.", "vision_methods.", "connector", *(("text.",) if now.get("task") != "text" else ()))  # reported elsewhere, or not the task's
    names = [name for name in {**was, **now} if was and not name.startswith(own) and name != "out"]
    # A file of an earlier version does not hold every setting; one that came since is empty where it changes nothing.
    changed = [name for name in names if was.get(name) != now.get(name) and (name in was or now[name] not in _SILENT)]
    return [f"{name} {was.get(name)} -> {now.get(name)}" for name in changed]


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


def new_model(config: RunConfig, source: SampleSource, task: Task | None = None) -> tuple[VisionLanguageModel, Texts]:
    """The composed model with new adapters on the language model and, where the config says so, on the encoder; and the texts it learns.

    source: the training data, whose most frequent answers a model that chooses among answers gets. task: of texts, on its data.
    Raises ConfigError and DataError as `compose`, `add_adapter` and `answer_vocabulary` do.
    """
    task = settled(config.chosen_task(), source) if task is None else task
    start = config.train.teachers.new
    methods = chosen_methods(config.methods, needs_one=config.connector == "frozen" and start is None)
    template = task.words_for(config.parts.model is not None, _asks_as_written(source))
    model = frozen_model(config.parts, template=template, layer=config.layer, use="read" if config.reads_only else "write")
    torch.manual_seed(config.train.seed)  # here, so that the adapter's start depends on nothing that was drawn before
    if start is not None:
        _start_from(model, start, config, methods)
        return model, task.texts
    model.add_adapter("default", methods, connector=config.connector, connector_methods=config.methods_on_connector)
    if config.start is not None:
        begin_with(model.adapted, config.start)
    for name, folder in config.train.frozen.items():
        fix_method(model.adapted, name, folder)
    if config.encoder_methods:
        model.add_vision_adapter(config.encoder_methods)
    if isinstance(task, TextTask):
        equip(model, task, source)
    if not config.n_answers:
        return model, task.texts
    vocabulary = answer_vocabulary(config.vqa, source)
    head = model.add_answer_head(vocabulary.answers)
    if head.warp is not None:
        _check_unlisted(vocabulary, head.warp.most_unlisted)
    return model, vocabulary.texts


def _check_unlisted(vocabulary: AnswerVocabulary, most: float) -> None:
    """Say how many questions have no answer in the list, which then teach nothing. Raises DataError where they are too many."""
    n_unlisted, n_questions = vocabulary.n_unlisted, vocabulary.n_questions
    log(f"{n_unlisted:,} of {n_questions:,} training questions have no answer among the {len(vocabulary.answers):,} of the list, and teach nothing")
    if n_unlisted > most * n_questions:
        raise DataError(
            f"{n_unlisted:,} of {n_questions:,} training questions have no answer among the {len(vocabulary.answers):,} of the list, more than "
            f"methods.warp.most_unlisted ({most:g}) allows: raise vqa.answers, or that share"
        )


def _start_from(model: VisionLanguageModel, folder: Path, config: RunConfig, methods: Mapping[str, Method]) -> None:
    """Put a saved adapter on the model, whose training goes on from its weights. Raises ConfigError where the config asks for another one."""
    if config.n_answers or config.encoder_methods or config.connector != "frozen" or config.methods_on_connector:
        raise ConfigError("train.teachers aligns words about the same features: leave vqa.answers, vision_methods, connector and connector_methods out")
    saved = AdaptedModel.read_config(folder)
    if methods and methods != saved.methods:
        raise ConfigError(
            f"the training starts from {folder}, whose methods are {', '.join(saved.methods)} with settings of their own, and the config's are others: "
            "give `methods: {}`, or the config of that run"
        )
    if saved.task.get("task") != config.task:
        raise ConfigError(f"the training starts from {folder}, which was trained for {saved.task.get('task')}, and the config's task is {config.task}")
    own = model.template
    model.load_adapter(folder, "default")
    if (words := model.template_of("default")) != own:
        raise ConfigError(f"the training starts from {folder}, which was trained with {words}, and the config has {own}: give the template of that run")


def _asks_as_written(source: SampleSource) -> bool:
    """Whether the questions are turns of conversations, by the first sample that is whole."""
    for index in range(len(source)):
        with contextlib.suppress(DamagedSample):
            return any(question.places is not None for question in source[index].questions)
    return False


# ----------------------------------------
# The images that a tracker shows at each measurement.


N_DISPLAYED = 6


def logged_samples(source: SampleSource, task: Task, texts: Mapping[int, str]) -> Sequence[LoggedSamples]:
    """Some images, always the same ones and spread over the source, each with its first question and the generated text."""
    logged: list[LoggedSamples] = []
    for index in range(0, len(source), max(len(source) // N_DISPLAYED, 1)):
        sample = source[index]
        if not sample.images:
            continue
        asked = next((one for one in task.asked(sample) if one.item in texts), None)
        if asked is None or len(logged) == N_DISPLAYED:
            continue
        try:
            image = decode_image(sample.images[0])
        except DataError:  # a source that has become unreadable is the evaluation's to report
            continue
        logged.append(LoggedSamples(key=sample.key, image=image, text=f"{asked.question} {texts[asked.item]}".strip()))
    return logged


@dataclass(frozen=True)
class Evaluation:
    """The scores of one data set, by what was done to the model; and the texts with the right images, with a sentence where too many are alike."""

    scores: Mapping[str, Score]
    predictions: Predictions
    seconds: float
    warning: str
    step_seconds: float | None = None  # of the training


def train_run(config: RunConfig, config_text: str, *, resume: bool = False, texts_of: Callable[[Texts], Texts] = lambda texts: texts) -> Evaluation:
    """Train, save, evaluate with and without the right images, and write the report into the run folder.

    texts_of   what is learned in the place of the task's texts of a sample, such as the same with weights

    Raises ConfigError where the config names no run folder or no training data, or the folder is taken.
    """
    if config.out is None or config.data.train is None:
        raise ConfigError("training needs `out`, the run folder, and `data.train`: give both")
    refuse_taken(config.out, resume=resume)  # before the models are loaded, which takes a while
    opened, val = (_opened(data, config) for data in (config.data.train, config.data.val))
    task = settled(config.chosen_task(), opened.source, val.source)
    _refuse_beyond(config, opened, val, task)
    torch.manual_seed(config.train.seed)
    model, texts = new_model(config, opened.source, task)
    _refuse_beyond(config, opened, val, task, model)
    also_trained = _whole_language_model(model) if config.train.full else {}
    check_training(model, config.train, config.out, resume=resume, also_trained=also_trained)  # before an image is read
    if is_main():
        model.print_trainable_parameters()
    with run_folder(config.out) as folder, features_to_learn(model, opened.source, config) as features:
        config_file = folder / "config.yaml"
        if not config_file.exists():
            config_file.write_text(config_text)
        elif changed := changed_config(config_file, config_text):
            _log(f"settings that are not those of {config_file}: {'; '.join(changed)}")
        images = read_images(val, features_to_log(model, val.source, config, "encoding the validation images"))
        before = _evaluate_untrained(folder, model, images, task, config)
        measurement = _Measurement(model, images, task, texts, config)
        trained = train(
            model, opened.source, texts_of(texts), config.train, folder, resume=resume, patches=features, known_bad=opened.problems,
            measure=measurement.metrics, judged_by=before[UNTRAINED].headline, samples=measurement.samples,
            also_trained=also_trained,
        )  # fmt: skip
        _log_skipped("training", trained.bad)
        best = "weights of step {}, the best of the run by {} ({:.2f})".format(*trained.best) if trained.best else ""
        if best:
            _log(f"the adapter has the {best}")
        config_file.write_text(config_text)  # of a resumed run first here: one that is refused leaves the old one
        _save(folder, model, task, config)
        evaluation = replace(_evaluate(model, images, task, config, before), step_seconds=trained.step_seconds)
        _note_states(folder, "trained", model, images, task, config)
        _write(folder, model, task, config_text, evaluation, images)
        if is_main():
            n_items = len(evaluation.predictions.texts)
            write_card_metrics(folder / "adapter", evaluation.scores[TRAINED], split=config.data.val.split_name, items=n_items, best=best)
    return evaluation


def _whole_language_model(model: VisionLanguageModel) -> dict[str, nn.Parameter]:
    """Every weight of the language model by name, trained from now on. Raises ConfigError where they are not all in float32."""
    found = {f"language_model.{name}": parameter for name, parameter in model.adapted.base.named_parameters()}
    if other := next((name for name, parameter in found.items() if parameter.dtype != torch.float32), None):
        raise ConfigError(f"train.full trains every weight, and {other} is in {found[other].dtype}: give base.language_model.dtype: float32, without quantise")
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def _save(folder: Path, model: VisionLanguageModel, task: Task, config: RunConfig) -> None:
    """The adapter, and beside it the language model where all of it was trained."""
    model.save_pretrained(folder / "adapter", task={"task": task.name, "generation": asdict(config.generation), **saved_labels(task)})
    if config.train.full and is_main():
        model.language.model.save_pretrained(folder / "language_model")
        model.language.tokenizer.save_pretrained(folder / "language_model")


def evaluate_run(
    config: RunConfig, config_text: str, adapter: Path, out: Path, submission: Submission, *, allow_other_base: bool = False
) -> Evaluation:
    """Evaluate a saved adapter on `data.val`: the official result file, results.json, metrics.json, config.yaml and report.html in `out`.

    Raises DataError where the official result file would have gaps that the submission does not allow.
    """
    task = config.chosen_task()
    model, saved = load_adapted(adapter, **vars(config.parts), allow_other_base=allow_other_base)
    _refuse_other_task(adapter, saved["task"], task)
    val = config.data.val.open()
    _log(val.sentence)
    task = settled(task, val.source, labels=saved.get("labels", ()))
    refuse_beyond(val, "data.val", task, f"the model of {adapter}", model.row_encoder())
    with run_folder(out) as folder:
        images = read_images(val, features_to_log(model, val.source, config, "encoding the images"))
        refuse_gaps(task, val, images.source, images.bad, submission)
        evaluation = _evaluate(model, images, task, config, {})
        _note_states(folder, "trained", model, images, task, config)
        if is_main():
            write_whole(folder / "config.yaml", config_text.encode())
        _write(folder, model, task, config_text, evaluation, images)
    # Outside: what was generated stays where the official file is refused.
    text = evaluation.predictions
    if is_main():
        print(write_submission(out, task, val, config.data.val.split_name, text.texts, text.bad, submission))
    return evaluation


def represent_adapter(config: RunConfig, adapter: Path, *, allow_other_base: bool = False) -> dict[str, Sequence[LayerStates]]:
    """What a saved adapter does to the hidden states of the first `representation` samples of data.val; and at its start, of a config with its methods.

    Raises ConfigError for another task's adapter or no samples, CheckpointError for one of another base, DataError where no sample can be read.
    """
    if not config.representation:
        raise ConfigError("samples is 0, and hidden states are compared on samples: give 1 or more, such as 64")
    task, val, found = config.chosen_task(), config.data.val.open(), {}
    _log(val.sentence)

    def states(model: VisionLanguageModel) -> Sequence[LayerStates]:
        few = Chosen(val.source, range(min(config.representation, len(val.source)))) if config.features is None else val.source
        images = read_images(Opened(few, val.problems), features_to_log(model, few, config, "encoding the images"))
        return representation(model, images.source, task, images.patches, samples=config.representation)

    if chosen_methods(config.methods, needs_one=False):
        found["untrained"] = states(new_model(config, (config.data.train or config.data.val).open().source)[0])
    model, saved = load_adapted(adapter, **vars(config.parts), allow_other_base=allow_other_base)
    _refuse_other_task(adapter, saved["task"], task)
    return {**found, "trained": states(model)}


def _refuse_other_task(adapter: Path, trained_for: str, task: Task) -> None:
    if trained_for != task.name:
        raise ConfigError(f"the adapter in {adapter} was trained for {trained_for}, and the config's task is {task.name}: give the config of its run")


def _opened(data: DataConfig, config: RunConfig) -> Opened:
    """A data set of which no more samples are known to be bad than the budget allows. Raises BudgetError and DataError."""
    opened = data.open()
    _log(opened.sentence)
    BadSamples(budget=config.train.bad_samples, found=opened.problems).check()
    return opened


def _refuse_beyond(config: RunConfig, train_data: Opened, val: Opened, task: Task, model: VisionLanguageModel | None = None) -> None:
    """As `refuse_beyond`: a composed model's data before it is loaded, those of one that sees already by its processor; and log which texts are cut."""
    if config.model is None or model is not None:
        reader = f"'{config.model}'" if config.model else f"a model of the encoder {config.encoder} and the language model {config.language_model}"
        for place, data in (("data.train", train_data), ("data.val", val)):
            refuse_beyond(data, place, task, reader, model and model.row_encoder())
    if model is not None:
        _log(cut_note(model, task, train_data.source, val.source))


def _evaluate(model: VisionLanguageModel, images: ReadImages, task: Task, config: RunConfig, before: Mapping[str, Score]) -> Evaluation:
    started = time.perf_counter()
    own = _predict(model, images, task, config)
    seconds = time.perf_counter() - started
    _log_skipped("evaluation", _check_bad(images, own, config))
    text = Predictions(own.texts, (*images.bad, *own.bad))
    warning = degenerate_note(own.texts.values(), config.generation) if model.head is None else ""
    if before and config.train.keep_best and isinstance(task, TextTask):
        warning = "; ".join(filter(None, (warning, CHOSE)))
    _log(warning)
    if not before and own.texts and not is_graded(task, images.source):
        return Evaluation({}, text, seconds, warning)
    other = _predict(model, images, task, config, shift=max(len(images.source) // 2, 1))
    blind = BLIND_TEXTS if isinstance(task, TextTask) else BLIND
    scores = {**before, TRAINED: task.score(own.texts, images.source), blind: task.score(other.texts, images.source)}
    if isinstance(task, TextTask) and (most := task.majority(images.source)) is not None:
        scores[f"always {most[0]!r} (majority)"] = most[1]
    note = scores[TRAINED].note
    if not before:
        _log(note)
    return Evaluation(scores, text, seconds, "; ".join(filter(None, (warning, note))))


CHOSE = "these rows chose the weights (train.keep_best), so the metric is too good: evaluate on a set that no run has seen"
LEAST = -100.0  # what a correlation that is undefined counts as where measurements are compared: less than any other


class _Measurement:
    """What a training asks of the validation data on its way."""

    def __init__(self, model: VisionLanguageModel, images: ReadImages, task: Task, texts: Texts, config: RunConfig) -> None:
        self._model, self._images, self._task, self._texts, self._config = model, images, task, texts, config
        self._stated: dict[int, str] = {}  # by the last measurement

    def metrics(self) -> dict[str, float]:
        """The task's metric, and the loss where there are texts to learn."""
        self._stated.update(_predict(self._model, self._images, self._task, self._config).texts)
        score = self._task.score(self._stated, self._images.source)
        loss = mean_loss(self._model, self._batches())
        value = score.metrics[score.headline]
        return {score.headline: LEAST if value is None else value, **({} if loss is None else {VAL_LOSS: loss})}

    def samples(self) -> Sequence[LoggedSamples]:
        """Some images with their generated texts."""
        return logged_samples(self._images.source, self._task, self._stated)

    def _batches(self) -> Batches:
        """This process's part of the samples, each once, with what a run would learn from them; the same at each measurement."""
        state, source = process_state(), self._images.source
        return self._model.batches(
            source, self._texts, batch_size=self._config.train.batch_size, features=self._images.patches, bad_samples=len(source),
            rank=state.process_index, world=state.num_processes,
        )  # fmt: skip


def _evaluate_untrained(folder: Path, model: VisionLanguageModel, images: ReadImages, task: Task, config: RunConfig) -> Mapping[str, Score]:
    untrained = _predict(model, images, task, config)
    _check_bad(images, untrained, config)  # not first after the training
    score = task.score(untrained.texts, images.source)
    _log(score.note)
    _note_states(folder, "untrained", model, images, task, config)
    return {UNTRAINED: score}


def _note_states(folder: Path, name: str, model: VisionLanguageModel, images: ReadImages, task: Task, config: RunConfig) -> None:
    """Add what the adapter does to hidden states to the run's representation.json; nothing where it is not asked for."""
    if config.representation and is_main():
        states = representation(model, images.source, task, images.patches, samples=config.representation)
        write_representation(folder, config.representation, {**read_representation(folder), name: states})


def _predict(model: VisionLanguageModel, images: ReadImages, task: Task, config: RunConfig, shift: int = 0) -> Predictions:
    return predict(model, images.source, task, images.patches, settings=config.generation, shift=shift)


def _check_bad(images: ReadImages, predictions: Predictions, config: RunConfig) -> BadSamples:
    """What could not be asked about; raises BudgetError over the budget."""
    bad = BadSamples(budget=config.train.bad_samples, found=[*images.bad, *predictions.bad])
    bad.check()
    return bad


def is_main() -> bool:
    """Whether this process, of those that train together, is the one that writes and prints; every one evaluates, and all find the same."""
    return bool(process_state().is_main_process)


def _log_skipped(what: str, bad: BadSamples) -> None:
    if bad.counts:
        _log(f"skipped in {what}: {bad.summary()}")


def _log(sentence: str) -> None:
    if sentence and is_main():
        print(sentence, file=sys.stderr)


def _write(folder: Path, model: VisionLanguageModel, task: Task, config_text: str, evaluation: Evaluation, images: ReadImages) -> None:
    if not is_main():
        return
    task.write_results(folder / "results.json", evaluation.predictions.texts)
    text, trained = evaluation.predictions, TrainedParts.of(model).counts()
    if whole := sum(parameter.numel() for parameter in model.adapted.base.parameters() if parameter.requires_grad):
        trained["language_model"] = whole
    write_metrics(
        folder / "metrics.json", task, evaluation.scores, items=len(text.texts), trained=trained, seconds=evaluation.seconds, bad=text.bad,
        step_seconds=evaluation.step_seconds,
    )  # fmt: skip
    write_run_report(folder, model, task, config_text, evaluation.scores, evaluation.predictions, images.source, warning=evaluation.warning)
