"""Adapters on the embedded parts: two that were trained on the scenes, of the development fixtures with their start, and others moved at random."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from shutil import copytree

import torch
from shared import fixtures

from adalink import Method
from adalink.checkpoint.folder import CONFIG_FILE
from adalink.lifecycle.flat import Flat, start_of
from multimodal.template import Template
from tasks.captioning import Captioning
from tasks.runs.compose import compose, load_adapted
from tasks.vqa import Vqa


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


def moved_adapter(out: Path, methods: Mapping[str, Method], task: Captioning | Vqa) -> Path:
    """The folder of an adapter on the embedded parts whose weights are off their start by N(0, 0.05)."""
    model = compose("scenes:encoder", "scenes:language", template=task.template)
    torch.manual_seed(0)
    adapter = model.add_adapter("default", methods)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(out, task={"task": task.name})
    return out
