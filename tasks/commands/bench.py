"""`adalink bench`, `adalink bench when` and `adalink search`: what they take, and what they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from adalink.errors import ConfigError
from adalink.files import write_whole
from tasks.commands import Command

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from tasks.bench.clock import Finding
    from tasks.bench.growth import Point
    from tasks.bench.models import Machine, Sizes
    from tasks.runs.search.runs import Planned

__all__ = ["BENCH", "SEARCH", "WHEN", "bench", "search", "when"]

PARTS = ("training", "existing", "features", "adapters", "lora", "ladder", "generation", "shards", "metrics")  # functions of tasks/bench/measurements.py


def bench(
    *,
    only: Literal["training", "existing", "features", "adapters", "lora", "ladder", "generation", "shards", "metrics", "growth"] | None = None,
    repetitions: int = 5,
    out: Path | None = None,
    plot: Path | None = None,
    size: Literal["tiny", "usual", "billion"] = "usual",
    model: str | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    compile: Literal["no", "yes"] = "no",
    threads: int = 1,
) -> None:
    """Measure this machine: training, cached features, adapters, ladders, generation, shards and scorers, each beside its peer, as ratios with their spread.

    Args:
        only: One part alone; by default every part but growth.
        repetitions: How often each side takes its turn after the first, which is not counted; the median is held against the target.
            A ratio is of seconds of the processor, all threads together, which other work disturbs less; on a GPU, and where Java scores, by the clock.
        out: A file for the table: .md, or .json with every ratio.
        plot: A .svg file for how time and memory grow; measured when it is given.
        size: tiny takes seconds and shows that the command works; usual is what the targets speak of; billion is for a GPU.
        model: One of the size's language models alone, such as llama60 or opt125; by default all of them, and questions on the first.
        device: cpu, cuda or cuda:N.
        dtype: Of the frozen models.
        compile: Whether both sides run compiled models.
        threads: Of the processor.
    """
    import torch

    from tasks.bench import measurements
    from tasks.bench.clock import about, as_json, as_markdown
    from tasks.bench.growth import as_svg, points
    from tasks.bench.models import Bench

    asked = Bench(sizes=_sizes(size, model), machine=_machine(device, dtype, compile, threads), repetitions=repetitions)
    _check(repetitions, out, plot, only)
    torch.set_num_threads(threads)
    where = about(asked)
    print("\n".join(f"{name}: {value}" for name, value in where.items()), flush=True)
    found: list[Finding] = []
    for part in [only] if only else PARTS:
        if part in PARTS:
            found += _displayed(getattr(measurements, part)(asked))
    if plot is not None or only == "growth":
        grown: list[Point] = []
        found += _displayed(_retained(points(asked), grown))
        if plot is not None:
            write_whole(plot, as_svg(grown, _held(next(point for point in grown if point.axis == "rank"), where)).encode())
    if out is not None:
        write_whole(out, (as_json if out.suffix == ".json" else as_markdown)(found, where).encode())


def _displayed(findings: Iterator[Finding]) -> list[Finding]:
    """Printed as they come: a whole run takes long."""
    from tasks.bench.clock import as_line

    found = []
    for finding in findings:
        print(as_line(finding), flush=True)
        found.append(finding)
    return found


def _retained(grown: Iterator[Point], into: list[Point]) -> Iterator[Finding]:
    for point in grown:
        into.append(point)
        yield point.finding


def _held(point: Point, where: Mapping[str, str]) -> str:
    """What an image of growth says of everything that does not grow."""
    held = f"{point.shape.name}, {point.work.n_patches} image tokens, {point.work.n_texts} captions an image, rank {point.rank} where these do not grow"
    return f"{held}; {where['machine']}, {where['precision']}, seconds {where['seconds']}"


def _sizes(size: str, model: str | None) -> Sizes:
    """A size, with one of its language models where one is named."""
    from tasks.bench.models import SIZES

    sizes = SIZES[size]
    if model is None:
        return sizes
    found = {shape.name: shape for shape in (*sizes.models, *sizes.growth_models)}
    if model not in found:
        raise ConfigError(f"--model is {model!r}, and --size {size} measures {', '.join(found)}: give one of these, or no --model")
    return replace(sizes, models=(found[model],), growth_models=(found[model],))


def _machine(device: str, dtype: str, compile: str, threads: int) -> Machine:
    import torch

    from tasks.bench.models import Machine

    if threads < 1:
        raise ConfigError(f"threads is {threads}: give 1 or more")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"the device {device!r} is none: give cpu, cuda or cuda:N") from None
    if place.type not in ("cpu", "cuda"):
        raise ConfigError(f"the device {device!r} is not measured: give cpu, cuda or cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        n_gpus = torch.cuda.device_count()
        raise ConfigError(
            f"the device {device!r} was asked for, and torch {torch.__version__} finds {n_gpus}: give --device cpu, or install torch for CUDA"
        )
    return Machine(
        device=place, dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype], is_compiled=compile == "yes", n_threads=threads
    )


def _check(repetitions: int, out: Path | None, plot: Path | None, only: str | None) -> None:
    """Before anything is measured: a wrong name at the end of an hour would be dear."""
    if repetitions < 1:
        raise ConfigError(f"repetitions is {repetitions}: give 1 or more, 5 for numbers that are published")
    for name, path, suffixes in (("out", out, (".md", ".json")), ("plot", plot, (".svg",))):
        if path is None:
            continue
        if path.suffix not in suffixes:
            raise ConfigError(f"--{name} is {path}: give a file whose name ends in {' or '.join(suffixes)}")
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"--{name} is {path}, and there is no folder {path.parent}: make it first")
    if plot is not None and only not in (None, "growth"):
        raise ConfigError(f"--plot draws how the cost grows, and --only {only} leaves that out: give --only growth, or no --only")


BENCH = Command.of(bench, "adalink bench --size tiny --repetitions 1", "adalink bench --only training --model opt125 --out bench.md")


# ----------------------------------------
# `adalink search`: which settings are best for what they cost.


def search(
    *,
    config: Path,
    space: Path,
    out: Path,
    trials: int = 60,
    control: int = 20,
    cost: Literal["parameters", "step_ms", "bytes"] = "parameters",
    metric: str | None = None,
    halving: Literal["on", "off"] = "on",
    jobs: int = 1,
    seed: int = 0,
    features: Path | None = None,
    resume: bool = False,
) -> None:
    """Search settings of a run for the best score at each cost, beside a random control; write configs to train, and a page.

    Args:
        config: The YAML file of a run. Trials train on its data.train and are scored on its data.search, or else on a fifth of data.train.
            Its data.val is read once, at the end, for the front alone.
        space: A YAML file that names settings of the run, and the values that each may have: `methods.lora.rank: {log2: [0, 6]}`.
        out: The folder of the search: trials.jsonl, front.json, report.html, configs in front/.
        trials: Configurations that the search proposes.
        control: Configurations that chance draws of the same space, trained likewise; 0: no control.
        cost: What is to be small: trained parameters (heads count), milliseconds of a training step, or bytes of the saved adapter.
        metric: What is to be large, a metric of the task; by default the one that a run is judged by.
        halving: Train all trials for a ninth of the steps, the best third of them on to a third, the best third of those to the end; off: all to the end.
        jobs: Trainings at once, each with its share of the cores.
        seed: Of the proposals. Trainings have the config's own seed; the front is trained again with the two that follow it.
        features: A folder for frozen features that all trials share, written first where it is empty.
        resume: Go on with the search in the folder, to the same trials.
    """
    from tasks.commands.parser import check_config_file
    from tasks.runs.search.command import Paths, run_search
    from tasks.runs.search.search import SearchSettings

    for file in (config, space):
        check_config_file(file)
    settings = SearchSettings(trials=trials, control=control, halving=halving == "on", seed=seed, jobs=jobs)
    paths = Paths(config=config, space=space, out=out, features=features)
    for line in run_search(paths, settings, _read, _planned, cost=cost, metric=metric, resume=resume):
        print(line, flush=True)


def _values(file: Path) -> tuple[Any, Any]:
    """A run's config as `adalink train --dry-run` reads it, plain and as objects. Raises ConfigError with its sentence."""
    from tasks.commands.parser import one_sentence, parsed
    from tasks.runs.config import setting_names

    try:
        _, plain, values = parsed(["train", "--dry_run", "--config", str(file)])
    except ConfigError as error:
        raise ConfigError(one_sentence(str(error), known=setting_names())) from None
    return plain, values


def _read(file: Path) -> tuple[Any, str]:
    """The settings of a config, whose methods may be missing; and all of them as YAML."""
    from tasks.commands.plan import dry_run_of
    from tasks.commands.train import config_text

    plain, values = _values(file)
    return dry_run_of(values), config_text(plain.as_dict())


def _planned(file: Path) -> Planned:
    """What a config would train. Raises what a dry run refuses, in its words."""
    from tasks.commands.plan import dry_run_of, plan_of
    from tasks.runs.search.runs import Planned

    _, values = _values(file)
    if values.task == "text":  # is not planned without its data, whose labels a head is as large as: its first rung counts
        return Planned(settings=dry_run_of(values), parameters=0, base=0)
    plan = plan_of(values)
    return Planned(settings=dry_run_of(values), parameters=plan.trained, base=plan.language_model.parameters)


def _add_search(parser: Any) -> None:
    parser.add_function_arguments(search, skip={"resume"})
    parser.add_argument("--resume", action="store_true", help="go on with the search in the folder, to the same trials")


SEARCH = Command(
    _add_search,
    lambda values, plain: search(**dict(vars(values))),
    examples=(
        "adalink search --config run.yaml --space space.yaml --trials 60 --out runs/search",
        "adalink search --config run.yaml --space space.yaml --trials 60 --out runs/search --resume",
    ),
)


# ----------------------------------------
# `adalink bench when`: when adapting pays.


def when(*, config: Path, out: Path, resume: bool = False) -> None:
    """Train methods of different budgets on samples of different sizes, over seeds, beside the whole language model trained.

    Args:
        config: The YAML file of a run with train.steps, and `axes`: lists under methods (head, full, or a method whose settings may be lists), shots (0: all
            samples), bases (language models) and seeds.
        out: The folder of the bench: cells.jsonl, table.md, table.csv, when.svg, and a run folder for each cell.
        resume: Go on with the bench in the folder; no cell is run twice.
    """
    from tasks.bench.when import run_cells
    from tasks.commands.parser import check_config_file

    check_config_file(config)
    for line in run_cells(config, out, _read, _planned, resume=resume):
        print(line, flush=True)


def _add_when(parser: Any) -> None:
    parser.add_function_arguments(when, skip={"resume"})
    parser.add_argument("--resume", action="store_true", help="go on with the bench in the folder; no cell is run twice")


WHEN = Command(
    _add_when, lambda values, plain: when(**dict(vars(values))), examples=("adalink bench when --config when.yaml --out runs/when",)
)  # fmt: skip
