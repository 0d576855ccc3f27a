"""`adalink selftrain`: sessions in which an adapter labels images for the next one."""

from __future__ import annotations

from typing import Any

from tasks.commands import Command
from tasks.commands.settings import DATA_ROWS, METHODS_ROW, PARTS_FIRST, add_run
from tasks.commands.train import config_text, run_config
from tasks.data.sources import DataConfig
from tasks.runs.config import RunConfig, SelfTraining
from tasks.runs.help import comments_as_help

__all__ = ["SELFTRAIN"]

_UNLABELLED = ("--unlabelled PATH", "images without captions, or with questions without answers; --unlabelled.NAME VALUE says more")


def _add(parser: Any) -> None:
    add_run(parser)
    comments_as_help(SelfTraining)
    parser.add_class_arguments(DataConfig, "unlabelled", skip={"cache", "cache_gib"})
    parser.add_class_arguments(SelfTraining, "selftrain")


def _run(values: Any, plain: Any) -> None:
    """Train all sessions, and print what each reached."""
    from tasks.metrics.bootstrap import aligned
    from tasks.runs.run import is_main
    from tasks.runs.selftrain import best_of, selftrain_run

    given = plain.as_dict()

    def text_of(own: RunConfig) -> str:
        return config_text({**given, "out": own.out, "data": {**given["data"], "train": own.data.train}})

    config = run_config(values)
    reached = selftrain_run(config, values.unlabelled, values.selftrain, text_of)
    if is_main():
        head = ("session", "texts of its teacher", f"{reached[0]['metric']}, held-out labels", f"{reached[0]['metric']}, data.val")
        rows = [(f"{one['session']}", f"{one['texts']:,}", f"{one['held_out']:.2f}", f"{one['val']:.2f}") for one in reached]
        print("\n".join(aligned([head, *rows])))
        best = best_of(reached)
        why = ", the labelled images alone: the sessions after it were no better" if best == 0 else ""
        print(f"best on the held-out labels: session {best}{why}; its adapter: {config.out}/{best}/adapter")


SELFTRAIN = Command(
    _add, _run, has_config=True,
    first=(
        *PARTS_FIRST, *DATA_ROWS, _UNLABELLED, METHODS_ROW,
        *(f"selftrain.{name}" for name in ("sessions", "share", "weights", "keep", "precision", "held_out")), "out",
    ),
    examples=("adalink selftrain --config run.yaml --unlabelled photos --selftrain.sessions 3 --out runs/self",),
)  # fmt: skip
