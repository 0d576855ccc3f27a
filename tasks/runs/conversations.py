"""Whether a model reads what the rows of a data set are: several images, none, earlier turns."""

from __future__ import annotations

from adalink.errors import ConfigError
from multimodal.existing.rows import ConversationRows
from multimodal.sample import counted
from tasks.data.sources import Opened
from tasks.task import Task

__all__ = ["refuse_beyond"]


def refuse_beyond(opened: Opened, place: str, task: Task, reader: str, encoder: object = None) -> None:
    """Raise ConfigError, with the number of rows, where a data set has some that a model cannot read.

    place    what the config calls the data set
    reader   what messages call the model
    encoder  what makes its rows; None for a composed model's, which has one image and one question in each
    """
    rows = encoder if isinstance(encoder, ConversationRows) else None
    is_existing = rows is not None
    reads = {
        "several images": rows is not None and rows.processor.prepares_apart,
        "no image": is_existing,
        "earlier turns": "{question}" not in task.template.prompt or (rows is not None and rows.reads_turns),
    }
    found = [f"{counted(number, 'row')} with {name}" for name, number in opened.beyond.items() if not reads[name]]
    if found:
        needs = "one image and one question" if not is_existing else " and ".join(f"no row with {name}" for name in opened.beyond if not reads[name])
        advice = "leave these rows out" if is_existing else "train one that sees already (model: NAME), or leave these rows out"
        raise ConfigError(f"{place} has {' and '.join(found)}, and {reader} reads {needs}: {advice}")
