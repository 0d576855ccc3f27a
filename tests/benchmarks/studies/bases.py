"""A frozen language model in several precisions: what its weights take in memory, and the loss that the same training reaches on it.

    python tests/benchmarks/studies/bases.py --config tasks/scenes/captioning.yaml
    python tests/benchmarks/studies/bases.py --config examples/flickr8k.yaml --encoder ... --language_model ... --data.train.images ... --patches FILE
    python tests/benchmarks/studies/bases.py --shape 512      # random weights in the proportions of Llama 3 8B, of this width; nothing is trained

Needs torchao on PYTHONPATH. Each row is a process of its own, so that memory is counted from the same start.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import multiprocessing
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionConfigFile, ArgumentParser
from share_of_full import kept_patches
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adalink.checkpoint.precision import BaseSettings, Precision, settle
from multimodal.training.prepare import mean_loss
from multimodal.training.train import train
from tasks.commands.train import results_table
from tasks.planning.precisions import cast_as, weight_bytes
from tasks.runs.config import RunConfig
from tasks.runs.run import new_model

PRECISIONS = ("float32", "bfloat16", "float32 int8", "bfloat16 int8", "float32 nf4", "bfloat16 nf4")
STEPS = 200


def main() -> None:
    """Print a table with a row for each precision."""
    parser = ArgumentParser()
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--shape", type=int, default=0, help="the width of a Llama with random weights; 0: train the run of the config")
    parser.add_argument("--layers", type=int, default=32, help="of that Llama")
    parser.add_argument("--patches", type=Path | None, default=None, help="a file that keeps the encoded images between calls")
    parser.add_argument("--only", type=str, nargs="*", default=list(PRECISIONS))
    if "--shape" not in sys.argv:
        parser.add_class_arguments(RunConfig, None)
    values = parser.instantiate(parser.parse_args())
    config = None if values.shape else RunConfig(**{name: values[name] for name in RunConfig.__dataclass_fields__})
    rows: dict[str, dict[str, float]] = {}
    for precision in values.only:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(_measured if config is None else _trained, (precision, *((values.shape, values.layers) if config is None else (config, values.patches))))
        first = rows.setdefault("float32", row) if precision == "float32" else rows.get("float32", row)
        rows[precision] = {**row, **{f"{name} / float32": row[name] / first[name] for name in ("loss", "resident MB", "weights MB") if name in row}}
        print(json.dumps({"precision": precision, **rows[precision]}), file=sys.stderr, flush=True)
    print(results_table(rows))


def _trained(precision: str, config: RunConfig, patches_file: Path | None) -> dict[str, float]:
    """Train for 200 steps; the validation loss, the bytes of the language model's weights, and whether those are as before."""
    assert config.data.train is not None
    torch.set_num_threads(1)
    settings = replace(config.train, steps=STEPS, measure_every=0, features="memory")
    config = replace(config, base=BaseSettings(language_model=Precision.of(precision)), train=settings)
    data, task = (config.data.train.open(), config.data.val.open()), config.chosen_task()
    patches = kept_patches(replace(config, base=BaseSettings()), data, patches_file)
    torch.manual_seed(settings.seed)
    model, texts = new_model(config, data[0].source)
    frozen = model.language.model
    before = _digest(frozen)
    with tempfile.TemporaryDirectory() as folder:
        trained = train(model, data[0].source, texts, settings, Path(folder), patches=patches[0])
    batches = model.batches(data[1].source, task.texts, batch_size=8, features=patches[1], bad_samples=0, rank=0, world=1)
    loss = mean_loss(model, batches)
    assert loss is not None
    assert _digest(frozen) == before
    return {"loss": loss, "weights MB": held_bytes(frozen) / 1e6, "seconds": trained.seconds}


def _measured(precision: str, width: int, layers: int) -> dict[str, float]:
    """What a language model with random weights takes of this process's memory, beside what the plan says of it."""
    config = LlamaConfig(
        vocab_size=128256 * width // 4096 // 8 * 8, hidden_size=width, intermediate_size=width * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=width // 128, num_key_value_heads=max(width // 512, 1), head_dim=128,
    )  # fmt: skip
    with torch.device("meta"):
        drawn = LlamaForCausalLM(config).float()
    cast_as(drawn, Precision.of(precision))
    planned = sum(weight_bytes(drawn, Precision.of(precision).quantiser).values())
    settle(nn.Sequential(nn.Linear(64, 64)).requires_grad_(False), Precision.of(precision), "what loads libraries")
    before = _resident()
    model = settle(LlamaForCausalLM(config).float().requires_grad_(False), Precision.of(precision), "random")
    resident = _resident() - before
    return {"resident MB": resident / 1e6, "weights MB": held_bytes(model) / 1e6, "planned MB": planned / 1e6, "planned / resident": planned / resident}


def held_bytes(module: nn.Module) -> int:
    """The bytes that a module's weights hold, those inside quantised ones too."""
    return sum(_inner_bytes(weight.data) for weight in module.parameters())


def _inner_bytes(tensor: Any) -> int:
    if type(tensor) is torch.Tensor:
        return tensor.untyped_storage().nbytes()
    return sum(_inner_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def _digest(module: nn.Module) -> str:
    """Of every byte of a module's weights."""
    digest = hashlib.sha256()

    def add(tensor: Any) -> None:
        if type(tensor) is torch.Tensor:
            flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))  # of one value, its stride may be any
            digest.update(flat.view(torch.uint8).numpy().tobytes())
            return
        for name in tensor.__tensor_flatten__()[0]:
            add(getattr(tensor, name))

    for weight in module.parameters():
        add(weight.data)
    return digest.hexdigest()


def _resident() -> int:
    """The bytes of this process that are in memory, without what was freed and is still held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))) * 1024


if __name__ == "__main__":
    main()
