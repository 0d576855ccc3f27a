"""The commands that score and compare: a function gives the figures, and the command prints them as a table or as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.compare import Comparison
from tasks.compare_listing import comparison_json, comparison_table
from tasks.compare_runs import compare_runs
from tasks.metrics.listing import Listing, as_json, as_table
from tasks.run_table import compare_many, many_json, many_table

__all__ = ["add_compared_runs", "add_scored", "run_compared", "run_compared_runs", "run_scored"]

_JSON = "print JSON in place of the table"


def add_scored(function: Callable[..., Listing | Comparison]) -> Callable[[Any], None]:
    """Adds the arguments of a function that gives figures, and `--json`."""

    def add(parser: Any) -> None:
        parser.add_function_arguments(function)
        parser.add_argument("--json", action="store_true", help=_JSON)

    return add


def add_compared_runs(parser: Any) -> None:
    """Adds the two run folders, what `compare_runs` takes beside them, and `--json`."""
    parser.add_argument("before", type=Path, metavar="RUN_A", help="the run folder of the first run, of `adalink train` or `adalink evaluate`")
    parser.add_argument("after", type=Path, metavar="RUN_B", help="the run folder of the second run, on the same data")
    parser.add_argument("more", type=Path, nargs="*", default=[], metavar="RUN_C", help="more runs: a table of all, and their curves over each other")
    parser.add_function_arguments(compare_runs, skip={"before", "after"})
    parser.add_argument("--json", action="store_true", help=_JSON)


def run_scored(function: Callable[..., Listing]) -> Callable[[Any, Any], None]:
    """Prints the figures of one file of results."""

    def run(values: Any, plain: Any) -> None:
        listing = function(**_arguments(values))
        print(as_json(listing) if values.json else as_table(listing))

    return run


def run_compared(function: Callable[..., Comparison]) -> Callable[[Any, Any], None]:
    """Prints how two runs differ."""

    def run(values: Any, plain: Any) -> None:
        comparison = function(**_arguments(values))
        print(comparison_json(comparison) if values.json else comparison_table(comparison))

    return run


def run_compared_runs(values: Any, plain: Any) -> None:
    """Prints how run folders differ, and where the page is: of two with the images that changed sides, of more with their curves."""
    report = values.report or (values.more or [values.after])[-1] / "comparison.html"
    if values.more:
        runs = compare_many([values.before, values.after, *values.more], report)
        print(many_json(runs) if values.json else many_table(runs))
    else:
        run_compared(compare_runs)(values, plain)
    if not values.json:
        print(f"report: {report}")


def _arguments(values: Any) -> dict[str, Any]:
    # Not vars(): the parser keeps `items` under another name, because its own class has a method of that name.
    return {name: value for name, value in values.as_dict().items() if name not in ("config", "json", "more")}
