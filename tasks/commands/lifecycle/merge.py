"""`adalink merge`: several saved adapters of one frozen model as one folder, and the search of its weights on validation data."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from adalink.errors import ConfigError
from adalink.files import refuse_full, write_whole
from tasks.commands import Command

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from adalink import AdaptedModel
    from adalink.checkpoint.folder import AdapterConfig
    from adalink.lifecycle.flat import Flat
    from adalink.lifecycle.merge import Merged, MergeSettings
    from tasks.evaluation.evaluate import ReadImages
    from tasks.runs.config import RunConfig

__all__ = ["MERGE", "Search", "candidates", "merge_adapters"]

SEARCH_FILE = "merge_search.json"
STEP = 10  # weights are tried in tenths
SCALES: Mapping[str, tuple[float, ...]] = {"arithmetic": (0.5, 0.7, 1.0), "pcb": (0.7, 1.0, 1.2)}  # of each choice of weights
SCALES_ALONE = (0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5)


def merge_adapters(
    *,
    folders: Sequence[Path],
    out: Path,
    method: Literal["stack", "svd", "average", "arithmetic", "ties", "dare", "dare_ties", "pcb"] = "stack",
    weights: Sequence[float] = (),
    scale: float = 1.0,
    keep: float | None = None,
    scope: Literal["whole", "method", "tensor"] = "whole",
    rank: int = 0,
    seed: int = 0,
    template_of: Path | None = None,
    search: Sequence[Path] = (),
) -> Merged:
    """Merge saved adapters of one frozen model into one folder.

    No merge is better than the adapters themselves, each for its own rows: `adalink serve --adapter a=DIR --adapter b=DIR` does that in one batch, exactly.
    Merge for places that know one adapter. `stack` is exact (ranks add), and so is `svd` of full rank. The others merge weights, at the size of one
    adapter, and need adapters that started from the same weights: of one seed and one config.

    Raises ConfigError and CheckpointError where the adapters cannot be merged rightly, or the folder is taken.

    Args:
        folders: The adapter folders.
        out: A new or empty folder for the merged adapter.
        method: stack and svd add up what the adapters compute; average, arithmetic, ties, dare, dare_ties and pcb merge weights.
        weights: One for each adapter. By default 1 / n; 1 each for arithmetic and pcb. With a bridge under stack, and for average, they must sum to 1.
        scale: Of the merged change of arithmetic, ties, dare and pcb.
        keep: Share of the entries that take part; ties 0.2, pcb 0.1, dare 0.9 (0.5 or more, for adapters are small).
        scope: What ties and pcb compare entries within: all of the adapter, each method, or each tensor.
        rank: Of svd; the share of the squared norm that it drops is printed.
        seed: Of the entries that dare drops.
        template_of: Which of the folders gives the words around question and answer; the first by default.
        search: Configs of runs (config.yaml). The weights and the scale are chosen on their data.val; every try is written to merge_search.json.
    """
    from adalink.lifecycle.merge import MergeSettings, merge, read_sources
    from tasks.runs.compose import frozen_of, saved_start

    settings = MergeSettings(method=method, weights=tuple(weights), scale=scale, keep=keep, scope=scope, rank=rank, seed=seed)
    frozen, starts = cache(lambda folder: frozen_of(Path(folder))), cache(saved_start)
    sources = read_sources(list(folders), frozen)
    refuse_full(out)
    found = ""
    if search:
        searched = Search([source.folder for source in sources], settings, starts, frozen, [_run_config(file) for file in search])
        settings, found = searched.best(), searched.as_json(search)
    merged = merge(folders, settings, start=starts, frozen=frozen, template_of=template_of)
    merged.write(out)
    if found:
        write_whole(out / SEARCH_FILE, found.encode())
    _print(merged, [source.config for source in sources], settings, out, template_of)
    return merged


def candidates(settings: MergeSettings, n: int) -> list[MergeSettings]:
    """What a search tries: weights in tenths that sum to one (times n for arithmetic and pcb, whose weights are 1 by default), and scales."""
    shares = [part for part in itertools.product(range(1, STEP), repeat=n) if sum(part) == STEP]
    if settings.method in ("stack", "svd", "average"):
        return [replace(settings, weights=tuple(one / STEP for one in part)) for part in shares]
    if settings.method in SCALES:
        pairs = itertools.product(shares, SCALES[settings.method])
        return [replace(settings, weights=tuple(one * n / STEP for one in part), scale=scale) for part, scale in pairs]
    return [replace(settings, scale=scale) for scale in SCALES_ALONE]


@dataclass(frozen=True)
class _Data:
    """A validation set, encoded once, with what is asked of it."""

    config: RunConfig
    images: ReadImages


class Search:
    """Tries merges on validation data. A merge's score is its smallest share, over the data, of the best that one of the adapters reaches alone.

    tries   what was tried: settings, the metric on each set, the score
    alone   the metric of each adapter on each set
    """

    def __init__(
        self,
        folders: Sequence[str],
        settings: MergeSettings,
        starts: Callable[[str], Flat],
        frozen: Callable[[str], AdaptedModel],
        runs: Sequence[RunConfig],
    ) -> None:
        from adalink.checkpoint.folder import local_folder, read_config
        from tasks.runs.compose import frozen_model

        self._folders, self._settings, self._starts, self._frozen = list(folders), settings, starts, frozen
        for run in runs:
            if run.n_answers or run.encoder_methods:
                raise ConfigError("a search reads runs that write their answers with a frozen encoder: give configs without vqa.answers and vision_methods")
        self._model = frozen_model(runs[0].parts, template=runs[0].chosen_task().template, layer=runs[0].layer)
        read_config(local_folder(folders[0])).check_base(self._model.adapted.parts, folders[0])
        self._data = [_Data(run, self._read(run)) for run in runs]
        self.tries: list[dict[str, Any]] = []
        self.alone = [self._metrics(folder) for folder in folders]

    def best(self) -> MergeSettings:
        """The settings of the best try; the first of several that are as good. Raises ConfigError where no adapter alone scores above 0."""
        limits = [max(scores) for scores in zip(*self.alone, strict=True)]
        if not all(limit > 0 for limit in limits):
            raise ConfigError(f"the adapters alone score {limits} on the data to search on, expected more than 0 on each: give data of their own tasks")
        found: list[tuple[float, MergeSettings]] = []
        for number, settings in enumerate(all_of := candidates(self._settings, len(self._folders)), start=1):
            with TemporaryDirectory() as folder:
                self._merged(settings).write(Path(folder) / "tried")
                metrics = self._metrics(Path(folder) / "tried")
            score = min(metric / limit for metric, limit in zip(metrics, limits, strict=True))
            self.tries.append({"settings": settings.to_json(len(self._folders)), "metrics": metrics, "score": score})
            found.append((score, settings))
            print(f"{number:>3} of {len(all_of)}  {_described(settings, len(self._folders))}: {_numbers(metrics)}, smallest share {100 * score:.1f} %")
        return max(found, key=lambda pair: pair[0])[1]

    def as_json(self, files: Sequence[Path]) -> str:
        """The tries, with what the adapters reach alone."""
        pairs = zip(files, self._data, strict=True)
        data = [{"config": str(file), "metric": one.config.chosen_task().headline, "images": len(one.images.source)} for file, one in pairs]
        alone = [{"adapter": folder, "metrics": metrics} for folder, metrics in zip(self._folders, self.alone, strict=True)]
        note = "the settings were chosen on these data: report scores on others"
        return json.dumps({"note": note, "data": data, "alone": alone, "tries": self.tries}, indent=2) + "\n"

    def _merged(self, settings: MergeSettings) -> Merged:
        from adalink.lifecycle.merge import merge

        return merge(self._folders, settings, start=self._starts, frozen=self._frozen)

    def _read(self, run: RunConfig) -> ReadImages:
        from tasks.evaluation.evaluate import read_images
        from tasks.runs.compose import features_to_log

        val = run.data.val.open()
        return read_images(val, features_to_log(self._model, val.source, replace(run, features=None), "encoding the validation images"))

    def _metrics(self, folder: str | Path) -> list[float]:
        """The headline metric on each set, each asked in its own task's words."""
        from tasks.evaluation.evaluate import predict

        model, metrics = self._model, []
        model.load_adapter(folder, "tried")
        for data in self._data:
            task = data.config.chosen_task()
            model.adapted.task = {**model.adapted.task, **task.words_for(data.config.model is not None).saved()}
            texts = predict(model, data.images.source, task, data.images.patches, settings=data.config.generation).texts
            score = task.score(texts, data.images.source)
            value = score.metrics[score.headline]
            metrics.append(-math.inf if value is None else value)  # undefined: worse than any
        model.delete_adapter("tried")
        return metrics


def _run_config(file: Path) -> RunConfig:
    from tasks.commands.parser import parsed
    from tasks.runs.config import RunConfig

    values = parsed(["train", "--config", str(file)])[2]
    return RunConfig(**{name: values[name] for name in RunConfig.__dataclass_fields__})


def _print(merged: Merged, configs: Sequence[AdapterConfig], settings: MergeSettings, out: Path, template_of: Path | None) -> None:
    size = sum(tensor.numel() for tensor in merged.tensors.values())
    print(f"wrote {out}: {_described(settings, len(configs))} of {len(configs)} adapters, {size:,} numbers")
    if settings.method == "svd":
        print(f"the rank {settings.rank} leaves out {100 * merged.dropped:.2f} % of the squared norm")
    words = [{name: config.task[name] for name in ("system", "prompt", "target") if config.task.get(name)} for config in configs]
    if any(one != words[0] for one in words):
        print(f"their words differ ({'; '.join(map(str, _unlike(words)))}); the merged adapter has those of {template_of or 'the first'}")


def _unlike(words: Sequence[Mapping[str, str]]) -> Iterator[Mapping[str, str]]:
    """Each once."""
    return (one for i, one in enumerate(words) if one not in words[:i])


def _described(settings: MergeSettings, n: int) -> str:
    found = settings.to_json(n)
    values = ", ".join(f"{name} {_numbers(value) if isinstance(value, list) else value}" for name, value in found.items() if name != "method")
    return f"{found['method']} ({values})" if values else str(found["method"])


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _add(parser: Any) -> None:
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="the adapter folders, of one frozen model")
    parser.add_argument("--weights", type=float, nargs="+", default=[], metavar="W", help=f"one for each adapter{_HELP['weights']}")
    parser.add_argument("--search", type=Path, nargs="+", default=[], metavar="FILE", help=f"configs of runs (config.yaml){_HELP['search']}")
    parser.add_function_arguments(merge_adapters, skip={"folders", "weights", "search"})


_HELP = {
    "weights": "; by default 1 / n, and 1 each for arithmetic and pcb; with a bridge under stack, and for average, they must sum to 1",
    "search": ": weights and scale are chosen on their data.val, and every try is written to OUT/merge_search.json; report scores on other data",
}


def _run(values: Any, plain: Any) -> None:
    merge_adapters(**dict(vars(values)))


MERGE = Command(
    _add, _run,
    (
        "adalink merge runs/a/adapter runs/b/adapter --out merged --weights 0.7 0.3",
        "adalink merge runs/a/adapter runs/b/adapter --out merged --search a.yaml b.yaml",
    ),
    ("out", "method", "weights", "scale", "search"),
)  # fmt: skip
