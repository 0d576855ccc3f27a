"""Two adapters that were trained on the embedded scenes, of the development fixtures: with the start that they were trained from."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import torch
from shared import fixtures

from adalink.checkpoint.folder import CONFIG_FILE
from adalink.lifecycle.flat import Flat, start_of
from multimodal.template import Template
from tasks.runs.compose import compose, load_adapted


def trained_adapter(out: Path, name: str) -> tuple[Path, Flat]:
    """The folder out/NAME, as it is written today, of the adapter `captioning` or `vqa`; and its start, which was drawn after the frozen parts were made."""
    found = fixtures("scenes_adapters")
    start = json.loads((found / "scenes_adapters.json").read_text())["start"]
    old = copytree(found / name, out / f"old-{name}")
    config = json.loads((old / "adapter_config.json").read_text())
    (old / CONFIG_FILE).write_text(json.dumps({**config, "start": {"seed": start["seed"], "digest": start["digest"]}}))
    torch.manual_seed(start["seed"])
    compose("scenes:encoder", "scenes:language", template=Template(prompt=config["task"]["prompt"]))
    state = torch.get_rng_state()
    model, _ = load_adapted(old)
    model.save_pretrained(out / name, task={})
    return out / name, start_of(out / name, model.adapted, (state,))
