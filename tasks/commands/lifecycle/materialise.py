"""`adalink materialise`: the adapter that hyper makes of one task, as an ordinary folder."""

from __future__ import annotations

from pathlib import Path

from adalink.errors import ConfigError
from adalink.files import refuse_full
from tasks.commands import Command

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from torch import Tensor

    from adalink.methods.budgets.hyper import Tasks
    from multimodal.model import VisionLanguageModel

__all__ = ["MATERIALISE", "materialise"]


def materialise(
    *,
    adapter: Path,
    out: Path,
    task: str = "",
    questions: Path | None = None,
    nearest: bool = False,
    encoder: str | None = None,
    language_model: str | None = None,
    model: str | None = None,
) -> None:
    """Write the adapter that a hyper adapter makes of one task as an ordinary folder: it costs less to serve, and can be merged and compressed.

    A task that was not trained is given by questions like its own: their mean is its prototype, or the nearest learnt prototype is taken.

    Raises ConfigError where the adapter has no hyper, the task no prototype, or the folder is taken.

    Args:
        adapter: The adapter folder, trained with the method hyper.
        out: A new or empty folder.
        task: A task that was trained.
        questions: In the place of a task, a text file with questions of a new one, one a line.
        nearest: Take the learnt prototype that the questions are nearest to.
        encoder: Where the encoder is, if not where the adapter says.
        language_model: Where the language model is, if not where the adapter says.
        model: Where the model that reads images itself is, if not where the adapter says.
    """
    import dataclasses

    from adalink.checkpoint.folder import read_config
    from adalink.lifecycle.flat import derived_from, parts_beside, read_flat, write_derived
    from adalink.methods.budgets.hyper import Tasks, hyper_of, materialised
    from tasks.data.files import read_lines
    from tasks.runs.compose import load_adapted

    if bool(task) == (questions is not None) or (nearest and questions is None):
        raise ConfigError("give one of --task NAME and --questions FILE; --nearest true goes with questions")
    refuse_full(out)
    lines = [] if questions is None else read_lines(questions, "question")
    if beside := parts_beside(adapter):
        raise ConfigError(f"the adapter in {adapter} has {' and '.join(beside)}, which one task's folder would lose: train one without")
    loaded, _ = load_adapted(adapter, encoder=encoder, language_model=language_model, model=model)
    whole = loaded.adapted.active_adapter()
    name, method = hyper_of(whole)
    tasks = whole.get_submodule(f"{name}.tasks")
    assert isinstance(tasks, Tasks)
    if task and task not in method.prototypes:
        raise ConfigError(f"the adapter in {adapter} has no task {task!r}: give one of {', '.join(method.prototypes)}, or --questions FILE for a new one")
    if lines:
        prototype, number = _prototype_of(loaded, tasks, lines)
        print(f"the nearest task to {len(lines)} questions is {method.prototypes[number]}")
        task = method.prototypes[number] if nearest else ""
    if task:
        prototype = tasks.prototypes[method.prototypes.index(task)].detach()
    methods, tensors = materialised(whole, prototype)
    settings = {"task": task} if task else {"questions": lines}
    config = dataclasses.replace(read_config(adapter), methods=methods, start=None)
    write_derived(out, config, tensors, derived_from("materialise", {str(adapter): read_flat(adapter, loaded.adapted)}, settings))
    print(f"wrote {out}: {method.of} of {task or 'the questions'}, {sum(tensor.numel() for tensor in tensors.values()):,} weights")


def _prototype_of(model: VisionLanguageModel, tasks: Tasks, questions: list[str]) -> tuple[Tensor, int]:
    """The unit mean [E] of the questions' vectors, and the number of the learnt prototype that it is nearest to."""
    import torch

    from adalink import TEXT

    rows, embedding = model.row_encoder(), model.adapted.anatomy.words.module
    assert embedding is not None
    found = []
    with torch.no_grad():
        for question in questions:
            row = rows.prompt(question)
            ids = torch.tensor([[id for id, domain in zip(row.ids, row.domain, strict=True) if domain == TEXT]], device=model.device)
            x = embedding(ids).to(tasks.prototypes)
            found.append(torch.nn.functional.normalize(tasks.vectors(x, torch.ones_like(x[..., :1]))[0], dim=-1))
        mean = torch.nn.functional.normalize(torch.stack(found).mean(0), dim=-1)
    return mean, int(tasks.nearest(mean[None])[0])


MATERIALISE = Command.of(materialise, "adalink materialise --adapter runs/first/adapter --task 'how many' --out counting")
