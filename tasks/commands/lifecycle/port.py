"""`adalink port`: a saved adapter on an updated base, after checks, with scores, and not at all where the scores speak against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adalink.errors import ConfigError, ScoreError
from tasks.commands import Command
from tasks.commands.lifecycle.compress import CLASSES, add_folder
from tasks.data.sources import DataConfig

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from adalink.lifecycle.port import Base, PortReport
    from multimodal.model import VisionLanguageModel
    from tasks.runs.ported import PortScores

__all__ = ["PORT", "port_adapter"]

REPORT_FILE = "port.json"
N_LISTED = 10  # weights on the screen, those that moved most


def port_adapter(
    *,
    adapter: Path,
    out: Path,
    language_model: str | None = None,
    encoder: str | None = None,
    model: str | None = None,
    old: str | None = None,
    data: DataConfig | None = None,
    most_negative: float | None = None,
    accept: bool = False,
    resamples: int = 1000,
) -> None:
    """Write an adapter for an updated base: its weights as they are, bound to the new parts.

    Raises CheckpointError where it means another thing there, and ScoreError where the scores speak against it.

    Args:
        adapter: The adapter folder.
        out: A new or empty folder.
        language_model: The new language model; the encoder stays as it was unless one is given.
        encoder: The new encoder; the language model stays as it was unless one is given.
        model: The new model that reads images itself.
        old: The language model, or the model that reads images itself, that the adapter was trained on; for drift, its score, and words of ids.
        data: Validation data to score on; without them the folder says that it was never measured.
        most_negative: The share of items that may be right on the old base and wrong on the new one.
        accept: Write it though the embedding table has another scale, or the scores speak against it; the folder says so.
        resamples: Draws for the bootstrap intervals.
    """
    from adalink.files import new_folder
    from adalink.lifecycle.port import port
    from tasks.evaluation.flip_rates import check_limit

    given = {"encoder": encoder, "language_model": language_model, "model": model}
    if not any(given.values()):
        raise ConfigError("the new base is not given: give --language_model, --encoder, or --model for a model that reads images itself")
    if most_negative is not None:
        check_limit(most_negative)
        if old is None or data is None:
            raise ConfigError("--most_negative_flips compares the old base with the new one on data: give --old and --data")
    own = "model" if model else "language_model"
    new_model, new = _loaded(adapter, given)
    old_model, before = (None, None) if old is None else _loaded(adapter, {own: old})
    report = port(adapter, new, old=before, accept=accept)
    print("\n".join([*report.checks, *_drift_lines(report)]))
    with new_folder(out) as folder:
        _write(folder, adapter, report, new, None if data is None else {})
        if data is None:
            sentence = "the ported adapter was never measured on this base: give --data to measure it"
            (folder / REPORT_FILE).write_text(json.dumps({**report.as_json(), "scores": None, "sentence": sentence}, indent=1) + "\n")
        else:
            scores = _scored(folder, adapter, new_model, old_model, data, resamples)
            print("\n".join(scores.lines()))
            sentence = _sentence(scores, most_negative, accept)
            _write(folder, adapter, report, new, {**scores.document(), "sentence": sentence})
            (folder / REPORT_FILE).write_text(json.dumps({**report.as_json(), "scores": scores.document(), "sentence": sentence}, indent=1) + "\n")
    print(f"{sentence}\nwrote {out}: the adapter {adapter} on {' and '.join(part.name for part in report.config.base.values())}")


def _loaded(adapter: Path, given: dict[str, str | None]) -> tuple[VisionLanguageModel | None, Base]:
    """The frozen parts that the adapter names, or those that are given in their place."""
    from adalink.checkpoint.folder import read_config
    from adalink.lifecycle.port import is_of_peft
    from multimodal.language import load_language
    from tasks.runs.compose import found_part, frozen_for, is_of_task
    from tasks.runs.config import Parts
    from tasks.runs.ported import base_of, base_of_language

    name = given.get("model") or given.get("language_model")
    if name is None or not is_of_peft(adapter):
        config = read_config(adapter)
        if is_of_task(config):
            loaded = frozen_for(config, Parts(**given))  # type: ignore[arg-type]  # names of parts
            return loaded, base_of(loaded)
        name = name or config.base["language_model"].name
    return None, base_of_language(load_language(found_part(name)))


def _write(folder: Path, adapter: Path, report: PortReport, new: Base, measured: dict[str, Any] | None) -> None:
    """The adapter's files, bound to the new base; of a LoRA of peft by the name alone, which is all that its folder has."""
    from dataclasses import replace

    from adalink.checkpoint.compressed import COMPRESSED_FILE
    from adalink.checkpoint.folder import PEFT_CONFIG_FILE, WEIGHTS_FILE, read_config, write_adapter
    from adalink.lifecycle.compress import copy_beside
    from adalink.lifecycle.flat import derived_from, read_flat
    from adalink.lifecycle.port import is_of_peft

    if is_of_peft(adapter):
        content = json.loads((adapter / PEFT_CONFIG_FILE).read_text())
        (folder / PEFT_CONFIG_FILE).write_text(json.dumps({**content, "base_model_name_or_path": new.part.name}, indent=2) + "\n")
        (folder / WEIGHTS_FILE).write_bytes((adapter / WEIGHTS_FILE).read_bytes())
        return
    if not (folder / "README.md").exists():
        copy_beside(adapter, folder)
    flat, codes = read_flat(adapter, new.adapted), adapter / COMPRESSED_FILE
    was = {role: part.fingerprint for role, part in read_config(adapter).base.items()}
    config = replace(report.config, derived=derived_from("port", {str(adapter): flat}, {"from": was, "measured": measured}))
    write_adapter(folder, flat.tensors(), config, compressed=codes.read_bytes() if codes.exists() else None)


def _scored(
    folder: Path, adapter: Path, new: VisionLanguageModel | None, old: VisionLanguageModel | None, data: DataConfig, resamples: int
) -> PortScores:
    from tasks.metrics.bootstrap import Resampling
    from tasks.runs.ported import port_scores
    from tasks.runs.scored import ScoredAdapter

    if new is None:
        raise ConfigError(f"the adapter in {adapter} names no task, so --data cannot be scored: leave it out")
    new.load_adapter(folder, "default")
    if old is not None:
        old.load_adapter(adapter, "default")
    task = new.adapted.task
    scored = [None if one is None else ScoredAdapter.of(one, task, data) for one in (new, old)]
    assert scored[0] is not None
    return port_scores(scored[0], scored[1], resampling=Resampling(n_resamples=resamples))


def _sentence(scores: PortScores, most_negative: float | None, accept: bool) -> str:
    try:
        return scores.sentence(most_negative)
    except ScoreError as error:
        if not accept:
            raise
        return f"accepted: {error}"


def _drift_lines(report: PortReport) -> list[str]:
    from tasks.metrics.bootstrap import aligned

    if not report.drift:
        return []
    mean = sum(one.relative for one in report.drift) / len(report.drift)
    rows = [("weight", "drift"), *((one.name, f"{one.relative:.4f}") for one in report.drift[:N_LISTED]), (f"mean of {len(report.drift)}", f"{mean:.4f}")]
    return aligned(rows)


def _add(parser: Any) -> None:
    add_folder(parser, port_adapter, "most_negative")
    about = "exit code 3 where surely more items than this share were right on the old base and are wrong now: 0.02 for two of a hundred"
    parser.add_argument("--most_negative_flips", type=float, metavar="SHARE", help=about)


def _run(values: Any, plain: Any) -> None:
    given = dict(vars(values))
    port_adapter(most_negative=given.pop("most_negative_flips"), **given)


PORT = Command(
    _add,
    _run,
    (
        "adalink port runs/first/adapter --language_model newer --out ported",
        "adalink port runs/a/adapter --language_model newer --old older --data val.csv --out ported",
    ),
    classes=CLASSES,
)
