"""`adalink compress` and `adalink decompress`: an adapter's folder in a few bits a weight, which every command reads, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from adalink.errors import CheckpointError
from tasks.commands import Command
from tasks.data.sources import DataConfig
from tasks.runs.help import comments_as_help

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from adalink.lifecycle.flat import Flat
    from tasks.runs.scored import ScoredAdapter

__all__ = ["CLASSES", "COMPRESS", "DECOMPRESS", "compress_adapter", "add_folder", "decompress_adapter"]

KEEPS = (0.05, 0.1, 0.2, 0.3, 0.5)  # what a search tries: the paper's values
ALPHAS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
CLASSES = (f"{DataConfig.__module__}.{DataConfig.__qualname__}",)  # that settings may be
TRIES_FILE = "search.json"


def compress_adapter(
    *,
    adapter: Path,
    out: Path,
    method: Literal["int4", "int8", "ternary"] = "int4",
    keep: float = 0.5,
    alpha: float = 1.5,
    start: Literal["drawn", "zero"] = "drawn",
    search: DataConfig | None = None,
    keeps: Sequence[float] = KEEPS,
    alphas: Sequence[float] = ALPHAS,
    encoder: str | None = None,
    language_model: str | None = None,
    model: str | None = None,
) -> None:
    """Write an adapter's folder in a few bits a weight.

    Raises CheckpointError where it is compressed already, or its start cannot be drawn again.

    Args:
        adapter: The adapter folder.
        out: A new or empty folder.
        method: Bits of a weight, with a scale for each row; ternary stores the signs of the weights that training changed most.
        keep: Of ternary, the share of the weights that change; above 0, up to 1.
        alpha: Of ternary, what each of them changes by; in standard deviations of the whole change.
        start: What changes are counted from; zero is for a folder whose start cannot be drawn again, and loses more.
        search: A data set to score every method on, with a table of sizes and scores; ternary then takes its best keep and alpha.
        keeps: The values of keep that a search tries.
        alphas: The values of alpha that a search tries.
        encoder: Where the encoder is, if not where the adapter says.
        language_model: Where the language model is, if not where the adapter says.
        model: Where the model that reads images itself is, if not where the adapter says.
    """
    from adalink.lifecycle.compress import check_settings, compress, source_of
    from adalink.lifecycle.flat import start_of
    from tasks.runs.compose import frozen_of
    from tasks.runs.scored import ScoredAdapter

    flat = source_of(adapter)  # what is refused is refused before a model is loaded
    for one, other in [(keep, alpha), *((one, other) for one in keeps for other in alphas)]:
        check_settings(one, other)
    parts = {"encoder": encoder, "language_model": language_model, "model": model}
    scored = None if search is None else ScoredAdapter.load(adapter, search, **parts)
    origin = None
    if start == "drawn":
        try:
            origin = start_of(adapter, frozen_of(adapter, **parts) if scored is None else scored.model.adapted)
        except CheckpointError as error:
            raise CheckpointError(f"{error}, or --start zero, which loses more") from None
    tries: list[dict[str, Any]] = []
    if scored is not None:
        tries, (keep, alpha) = _searched(scored, flat, origin, keeps, alphas)
    done = compress(adapter, out, method=method, keep=keep, alpha=alpha, start=origin)
    if tries:
        (out / TRIES_FILE).write_text(json.dumps(tries, indent=1) + "\n")
    print(f"wrote {out} by {method}: {done.summary(_bytes(adapter))}")


def _bytes(adapter: Path) -> int:
    from adalink.checkpoint.folder import stored_tensors

    return stored_tensors(adapter)[0].stat().st_size


def _searched(
    scored: ScoredAdapter, flat: Flat, start: Flat | None, keeps: Sequence[float], alphas: Sequence[float]
) -> tuple[list[dict[str, Any]], tuple[float, float]]:
    """Every try with its size and score, which are printed as they come; and the keep and alpha of the best ternary one."""
    from adalink.lifecycle.compress import coded

    whole = scored.answers()
    name = whole.score.headline
    print(f"{'method':<8} {'keep':>5} {'alpha':>5} {'bytes':>10} {'bits':>6} {'x fp16':>6} {name:>8}  share", flush=True)
    print(f"{'as it is':<20} {'':>10} {'':>6} {'':>6} {whole.value:8.2f}  100.0 %", flush=True)
    given: list[dict[str, Any]] = [{"method": "int8"}, {"method": "int4"}]
    given += [{"method": "ternary", "keep": keep, "alpha": alpha} for keep in keeps for alpha in alphas]
    tries = []
    for settings in given:
        done = coded(flat, start, **settings)
        value = scored.answers(done.weights).value
        tries.append({**settings, "bytes": len(done.content), "bits": done.bits, name: value, "share": value / whole.value if whole.value else None})
        cells = f"{settings['method']:<8} {settings.get('keep', ''):>5} {settings.get('alpha', ''):>5}"
        share = f"{100 * value / whole.value:5.1f} %" if whole.value else ""
        print(f"{cells} {len(done.content):10,} {done.bits:6.2f} {16 / done.bits:6.1f} {value:8.2f}  {share}", flush=True)
    best = max((one for one in tries if one["method"] == "ternary"), key=lambda one: float(one[name]))
    return [{"method": "none", name: whole.value}, *tries], (best["keep"], best["alpha"])


def decompress_adapter(*, adapter: Path, out: Path, encoder: str | None = None, language_model: str | None = None, model: str | None = None) -> None:
    """Write a compressed adapter as an ordinary folder, with the weights that every command reads from it.

    Raises CheckpointError where it is not compressed, or is damaged.

    Args:
        adapter: The compressed adapter folder.
        out: A new or empty folder.
        encoder: Where the encoder is, if not where the adapter says.
        language_model: Where the language model is, if not where the adapter says.
        model: Where the model that reads images itself is, if not where the adapter says.
    """
    from adalink.lifecycle.compress import check_compressed, decompress
    from tasks.runs.compose import frozen_of

    check_compressed(adapter)
    decompress(adapter, out, frozen_of(adapter, encoder=encoder, language_model=language_model, model=model))
    print(f"wrote {out}: {_bytes(out):,} bytes of weights")


def add_folder(parser: Any, function: Callable[..., None], *without: str) -> None:
    """The arguments of a function, the adapter folder first and without a name; but not those `without`."""
    comments_as_help(DataConfig)
    parser.add_argument("adapter", type=Path, metavar="DIR", help="the adapter folder")
    parser.add_function_arguments(function, skip={"adapter", *without})


def _of_folder(function: Callable[..., None], *examples: str) -> Command:
    return Command(lambda parser: add_folder(parser, function), lambda values, plain: function(**dict(vars(values))), examples, classes=CLASSES)


COMPRESS = _of_folder(
    compress_adapter, "adalink compress runs/first/adapter --out small", "adalink compress runs/first/adapter --out small --method ternary --search val.csv"
)
DECOMPRESS = _of_folder(decompress_adapter, "adalink decompress small --out plain")
