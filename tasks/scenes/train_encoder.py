"""Train the frozen encoder of scenes: a timm vision transformer, supervised with class numbers. It never sees a word.

Every patch tells the object that covers it (shape, colour, size), whether that object's centre lies in it, and how many objects
of its shape and of its colour the picture holds; the class token tells the background and the counts. The heads are linear and
dropped afterwards, so what they read lies linearly in the features that an adapter gets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from tasks.scenes.draw import draw
from tasks.scenes.scene import SIDE, Scene, make_scene
from tasks.scenes.words import BACKGROUNDS, COLOURS, SHAPES, SIZES

__all__ = ["train_encoder"]

# One convolution before the transformer. After 38,000 pictures it names four shapes in five; without it, little more than one in four.
ARCHITECTURE = "vit_tiny_r_s16_p8_224"
MODEL_ARGS = {"img_size": SIDE, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}  # 4 x the convolution's stride of 4 = 16
PATCH = 16
CELLS = SIDE // PATCH
MEAN = STD = (0.5, 0.5, 0.5)
SEED = 20_001  # of the scenes drawn here; Scenes draws its own from other strings
BATCH = 64
NONE = -100  # no target here
# What a patch tells, with its number of classes: 0 is "no object" for the first three. Counts are 1..4, less one.
PATCH_TARGETS = {"shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1, "size": len(SIZES) + 1, "centre": 2, "same_shape": 4, "same_colour": 4}
N_GLOBAL = {"background": len(BACKGROUNDS), "things": 5} | {f"count {w}": 5 for w in (*SHAPES, *COLOURS)}


def train_encoder(folder: Path, *, steps: int) -> None:
    """Train for this many batches of 64 fresh pictures, then write config.json and model.safetensors into the folder."""
    torch.manual_seed(SEED)
    encoder = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0, **MODEL_ARGS)
    heads = nn.ModuleList(nn.Linear(encoder.embed_dim, sum(sizes.values())) for sizes in (PATCH_TARGETS, N_GLOBAL))
    weights = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    for step, (pixels, per_patch, per_picture) in zip(range(steps), _batches(), strict=False):
        tokens = encoder.forward_features(pixels)
        patch_loss, patch_right = _score(heads[0](tokens[:, 1:]), per_patch, PATCH_TARGETS)
        global_loss, global_right = _score(heads[1](tokens[:, 0]), per_picture, N_GLOBAL)
        optimizer.zero_grad()
        (patch_loss + 0.1 * global_loss).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            shown = {name: round(right, 3) for name, right in (patch_right | dict(list(global_right.items())[:3])).items()}
            print(f"encoder {step + 1}/{steps} loss {patch_loss:.3f} {global_loss:.3f} {shown}", flush=True)
    _save(encoder, folder)


def _batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pixels f32 [B, 3, 96, 96], targets of the patches i64 [B, 36, 6] and of the pictures i64 [B, 18], without end."""
    rng = Random(SEED)
    while True:
        scenes = [make_scene(rng) for _ in range(BATCH)]
        pixels = torch.from_numpy(np.stack([np.asarray(draw(scene, rng)) for scene in scenes])).permute(0, 3, 1, 2)
        normal = (pixels / 255 - MEAN[0]) / STD[0]
        yield normal, torch.tensor([_patch_targets(s) for s in scenes]), torch.tensor([_global_targets(s) for s in scenes])


def _patch_targets(scene: Scene) -> list[list[int]]:
    rows = [[0, 0, 0, 0, NONE, NONE] for _ in range(CELLS * CELLS)]
    for thing in scene.things:
        said = [list(SHAPES).index(thing.shape) + 1, COLOURS.index(thing.colour) + 1, list(SIZES).index(thing.size) + 1]
        counts = [len(scene.alike(shape=thing.shape)) - 1, len(scene.alike(colour=thing.colour)) - 1]
        centre = thing.y // PATCH * CELLS + thing.x // PATCH
        for cell in range(CELLS * CELLS):
            x, y = (cell % CELLS + 0.5) * PATCH, (cell // CELLS + 0.5) * PATCH
            if cell == centre or (rows[cell][0] == 0 and (x - thing.x) ** 2 + (y - thing.y) ** 2 < (0.85 * thing.radius) ** 2):
                rows[cell] = [*said, int(cell == centre), *counts]
    return rows


def _global_targets(scene: Scene) -> list[int]:
    counts = [len(scene.alike(shape=s)) for s in SHAPES] + [len(scene.alike(colour=c)) for c in COLOURS]
    return [BACKGROUNDS.index(scene.background), len(scene.things), *counts]


def _score(logits: Tensor, targets: Tensor, sizes: dict[str, int]) -> tuple[Tensor, dict[str, float]]:
    """The sum of the targets' cross entropies, and the share of each that is right (where an object is, for the patches')."""
    total, right = logits.new_zeros(()), {}
    for index, (name, part) in enumerate(zip(sizes, logits.split(list(sizes.values()), dim=-1), strict=True)):
        target = targets[..., index]
        total = total + functional.cross_entropy(part.flatten(0, -2), target.flatten(), ignore_index=NONE)
        where = target > 0
        right[name] = (part.argmax(-1) == target)[where].float().mean().item()
    return total, right


def _save(encoder: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().half().contiguous() for name, t in encoder.state_dict().items()}, folder / "model.safetensors")
    settings = {
        "input_size": [3, SIDE, SIDE], "fixed_input_size": True, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
        "mean": list(MEAN), "std": list(STD), "num_classes": 0, "pool_size": None, "first_conv": "patch_embed.backbone.conv", "classifier": "head",
    }  # fmt: skip
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": MODEL_ARGS["embed_dim"],
        "global_pool": "token",
        "model_args": MODEL_ARGS,
        "pretrained_cfg": settings,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
