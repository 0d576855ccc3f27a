"""A caption adapter of the scenes on language models that were trained on, or moved at random: its score beside how far the weights moved.

    PYTHONPATH=.:tests/support OMP_NUM_THREADS=1 python tests/benchmarks/studies/port.py [--images 200]

The adapter is the development fixture scenes_adapters/captioning. The updates go on by the language model's own recipe (texts of the scenes, learning
rate 1e-3), 20, 60 and 140 steps; and move every matrix by a share of its standard deviation in a random direction.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from scenes_adapters import trained_adapter

from adalink.errors import ScoreError
from adalink.lifecycle.port import drift_of
from multimodal.language import load_language
from tasks.data.sources import DataConfig
from tasks.runs.compose import load_adapted
from tasks.runs.ported import base_of, port_scores
from tasks.runs.scored import ScoredAdapter
from tasks.scenes.parts import language_folder
from tasks.scenes.train_parts import _documents, _encode

STEPS, SHARES = (20, 60, 140), (0.02, 0.05, 0.1, 0.2, 0.4)


def updates() -> Iterator[tuple[str, Any]]:
    """(name, language model with its tokenizer) of each update."""
    for share in SHARES:
        language = load_language(language_folder())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in language.model.parameters():
                if parameter.dim() > 1:
                    parameter.add_(share * parameter.std() * torch.randn(parameter.shape, generator=generator))
        yield f"random, {share:g} of each matrix", language
    language = load_language(language_folder())
    model, tokenizer = language.model.requires_grad_(True), language.tokenizer
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    documents = _documents(Random(7))
    for step in range(1, max(STEPS) + 1):
        ids, mask = _encode(tokenizer, [next(documents) for _ in range(16)], end, pad)
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in STEPS:
            trained = copy.deepcopy(model).requires_grad_(False).eval()
            yield f"trained on, {step} steps", type(language)(model=trained, tokenizer=tokenizer, name=f"{step} steps")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    data = DataConfig(scenes=f"val/{parser.parse_args().images}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, _ = trained_adapter(Path(temporary), "captioning")
        model, saved = load_adapted(folder)
        old, before = ScoredAdapter.of(model, saved, data), base_of(model)
        print(f"| update | mean drift | of the table | old base | alone | ported | gain, 95 % | negative flips | `port` |\n|{'---|' * 9}")
        for name, language in updates():
            moved, _ = load_adapted(folder)
            moved.language.model.load_state_dict(language.model.state_dict())
            drift = {one.name: one.relative for one in drift_of(before, base_of(moved))}
            scores = port_scores(ScoredAdapter.of(moved, saved, data), old)
            found = scores.document()
            low, high = found["gain_interval"]
            try:
                outcome = "written" if scores.sentence(0.02) else ""
            except ScoreError as error:
                outcome = "not better" if "not surely better" in str(error) else "flips"
            values = [f"{value:.1f}" for value in found["scores"].values()]
            moves = [f"{sum(drift.values()) / len(drift):.3f}", f"{next(value for key, value in drift.items() if 'embed_tokens' in key):.3f}"]
            cells = [name, *moves, *values, f"{low:+.1f} .. {high:+.1f}", f"{100 * found['negative_flip_rate']:.1f} %", outcome]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
