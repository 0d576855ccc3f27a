"""Old import paths: what could be imported from a module of version 0.1.0 can still be, with a warning that names the new place."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from adalink.moved import _MOVED, _RENAMED

NAMES: dict[str, str] = json.loads((Path(__file__).parents[1] / "fixtures" / "before" / "names.json").read_text())
# Folders have these names now, or a function of the package; and what only the command line itself imported.
GONE = {"adalink.attach", "adalink.checkpoint", "multimodal.batches", "tasks.data", "tasks.metrics.ptb", "tasks.report"}
GONE |= {f"tasks.{name}" for name in "config_file feature_command figure_commands given_images help plan_commands say saved_settings show sweep draft demo launch".split()}
GONE |= {"tasks.bench.command", "tasks.serve.command", "tasks.commands", "multimodal.processes", "tasks.lmms_eval_model", "tasks.shards"}
NO_MORE = {"index_shards", "open_remote_set", "open_shard_set"}  # places of samples are read from an index beside each shard since


@pytest.mark.parametrize("old", sorted(NAMES.keys() - GONE))
def test_every_public_name_is_found_where_it_was(old: str) -> None:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        module: Any = importlib.import_module(old)
    renamed = set() if old in _MOVED else _RENAMED.keys()  # in a module that stays where it was
    assert [name for name in NAMES[old].split() if name not in renamed | NO_MORE and not hasattr(module, name)] == []


def test_the_warning_names_the_new_path_once() -> None:
    import sys

    sys.modules.pop("multimodal.train_settings", None)
    with pytest.warns(DeprecationWarning, match=r"^multimodal\.train_settings is now multimodal\.training\.settings; the old path goes with the next version$"):
        old = importlib.import_module("multimodal.train_settings")
    from multimodal.training.settings import TrainSettings

    assert old.TrainSettings is TrainSettings


def test_a_path_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'multimodal\.train_setting'"):
        importlib.import_module("multimodal.train_setting")
