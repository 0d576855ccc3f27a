"""`adalink route`: a router over saved adapters, made of examples of their rows."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any, Literal

from adalink.errors import ConfigError
from tasks.commands import Command
from tasks.commands.answer import named_adapters

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from torch import Tensor

    from adalink import AdaptedModel
    from multimodal.model import VisionLanguageModel
    from multimodal.sample import Sample, SampleSource

__all__ = ["ROUTE", "example_rows", "route"]


def route(
    *,
    adapter: list[str],
    out: Path,
    data: list[str] | None = None,
    examples: int = 1000,
    by: Literal["gate", "prototypes"] = "gate",
    top: int = 1,
    centers: int = 8,
    unknown: Literal["base", "refuse"] = "base",
    depth: Literal[1, 2] = 1,
    prune: float = 0.0,
    seed: int = 0,
    link: bool = False,
    encoder: str | None = None,
    language_model: str | None = None,
    model: str | None = None,
    allow_other_base: bool = False,
) -> None:
    """Write a folder that finds the adapter of a request by its image and its question: `adalink serve --router` and `load_router` read it.

    Args:
        adapter: The adapters, NAME=DIR each, of one frozen model.
        out: A new or empty folder, for the router and copies of the adapters.
        data: Where an adapter's examples are, NAME=CONFIG each: a run's config.yaml, or a recipe. By default the config.yaml of the adapter's own run.
        examples: How many images of an adapter's training data are read, spread over all of it; one question of each.
        by: gate is trained on the examples of all adapters, in seconds; prototypes are the centres of each adapter's own.
        top: How many adapters serve a row, mixed by their weights; 1 for the best alone, as if it had been named; 0 for all of them.
        centers: How many prototypes an adapter has.
        unknown: What becomes of a row that is like none of the examples; base leaves it to the frozen model, refuse is an error.
        depth: How many layers the gate has.
        prune: The share of what training changed that is taken back in the copies, the smallest changes of each tensor; 0.9 in E-WEMoE, 0 for none.
        seed: Of which examples are held out, which question of an image is taken, the prototypes and the gate's start.
        link: Leave the adapters where they are, and write their paths.
        encoder: Where the encoder is, if not where the first adapter says.
        language_model: Where the language model is, if not where the first adapter says.
        model: Where the model that reads images itself is, if not where the first adapter says.
        allow_other_base: Load the adapters though a frozen part is not as it was when they were trained; what differs is a warning.
    """
    from adalink.files import new_folder
    from adalink.lifecycle.route import Router, RouteSettings, write_router
    from multimodal.generation.routing import check_members
    from tasks.runs.compose import adapters_on

    settings = RouteSettings(by=by, top=top, centers=centers, unknown=unknown, depth=depth, seed=seed)
    folders, configs = named_adapters(adapter), named_adapters(data or [], "--data")
    if len(folders) < 2:
        raise ConfigError(f"--adapter names {len(folders)} adapters, and a router chooses among two or more: give --adapter NAME=DIR NAME=DIR")
    if stray := [name for name in configs if name not in folders]:
        raise ConfigError(f"--data names {stray[0]}, and the adapters are {', '.join(folders)}: give each data set the name of its adapter")
    if examples < 2 or not 0 <= prune < 1 or (prune and link):
        raise ConfigError(f"--examples is {examples} and --prune {prune:g}{' with --link' * link}: give 2 or more, and from 0 to less than 1 of copies alone")
    with new_folder(out) as folder:
        served = adapters_on(folders, encoder=encoder, language_model=language_model, model=model, allow_other_base=allow_other_base)
        check_members(served, tuple(folders))
        rows = {name: _rows(served, name, path, configs.get(name), examples, seed) for name, path in folders.items()}
        router = Router.fit(rows, settings)
        if not link:
            folders = {name: _copied(path, folder / "members" / name, prune, served.adapted) for name, path in folders.items()}
        write_router(folder, router, folders)
    for name in router.names:
        print(f"{name}: {len(rows[name]):,} examples; of those held out {100 * router.right[name]:.1f} % are routed right")
    print(f"wrote {out}: a router by {by} over {len(folders)} adapters; `adalink serve --router {out}` answers requests for the model `auto`")


def _copied(source: Path, out: Path, share: float, frozen: AdaptedModel) -> Path:
    """A copy of an adapter folder, or the adapter without the smallest of its differences to its start. Raises CheckpointError as `start_of`."""
    import torch

    from adalink.checkpoint.folder import read_config
    from adalink.lifecycle.flat import derived_from, read_flat, start_of, write_derived
    from adalink.lifecycle.route import pruned

    if not share:
        return Path(shutil.copytree(source, out))
    flat, start = read_flat(source, frozen), start_of(source, frozen)
    change = torch.cat([pruned((flat.vector - start.vector)[part], share) for part in flat.parts().values()])
    write_derived(out, read_config(source), flat.over(start.vector + change), derived_from("route", {str(source): flat}, {"prune": share}))
    return out


def _rows(model: VisionLanguageModel, name: str, adapter: Path, config: Path | None, n: int, seed: int) -> Tensor:
    """float64 [B, F] of an adapter's examples."""
    import yaml

    from tasks.data.sources import saved_data

    path = config or adapter.parent / "config.yaml"
    try:
        content: Any = yaml.safe_load(path.read_text())
        task, settings = content["task"], content["data"]["train"] or content["data"]["val"]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the examples of {name} are looked for in {path}, which cannot be read ({error}): give --data {name}=CONFIG") from None
    except (yaml.YAMLError, KeyError, TypeError):
        raise ConfigError(f"{path} names no task with data.train, and the examples of {name} are read there: give a run's config.yaml, or a recipe") from None
    return example_rows(model, saved_data({key: value for key, value in settings.items() if value is not None}).open().source, task, n, seed)


def example_rows(model: VisionLanguageModel, source: SampleSource, task: str, n: int, seed: int) -> Tensor:
    """float64 [B, F]: the features of at most n images of a data set, evenly spread, each with one of the questions that the task asks about it."""
    import torch

    from multimodal.batches.collate import stacked
    from multimodal.data.feature_cache.encode import encode_all
    from multimodal.generation.routing import RowFeatures
    from tasks.data.sources import Chosen

    n = min(n, len(source))
    chosen, draw, features = Chosen(source, [i * len(source) // n for i in range(n)]), random.Random(seed), RowFeatures(model.language, model.tower)
    table = encode_all(model, chosen, label="encoding the examples", dtype="float32")
    rows = []
    for i in table.usable():
        question = _question(chosen[i], task, draw)
        if question is not None:
            rows.append(features.of(stacked([table[i]]), [0], [question]))  # type: ignore[list-item]  # a usable one is none of the bad
    return torch.cat(rows) if rows else torch.zeros(0)


def _question(sample: Sample, task: str, draw: random.Random) -> str | None:
    """What the task asks about the sample: nothing where it captions, one of its questions elsewhere; None where it has none."""
    if task == "captioning":
        return ""
    return draw.choice(sample.questions).text if sample.questions else None


def _add(parser: Any) -> None:
    parser.add_argument("--adapter", type=str, nargs="+", action="extend", default=[], metavar="NAME=DIR", help="the adapters, of one frozen model")
    where = "where an adapter's examples are: a run's config.yaml, or a recipe; by default the config.yaml of the adapter's own run"
    parser.add_argument("--data", type=str, nargs="+", action="extend", default=[], metavar="NAME=CONFIG", help=where)
    parser.add_function_arguments(route, skip={"adapter", "data"})


ROUTE = Command(
    _add,
    lambda values, plain: route(**dict(vars(values))),
    (
        "adalink route --adapter caption=runs/scenes/adapter vqa=runs/scenes-vqa/adapter --out routed",
        "adalink route --adapter a=a b=b --data a=a.yaml b=b.yaml --by prototypes --out routed",
    ),
)
