"""What beams do to the texts of an adapter: figures, texts and their probability, beside an uncached run of transformers' own generation.

    PYTHONPATH=. python tests/benchmarks/studies/beams.py --config RUN/config.yaml --adapter RUN/adapter --images 100
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionConfigFile, ArgumentParser
from torch import Tensor

from multimodal.batches.collate import collate
from multimodal.generation.generate import generated_texts
from tasks.data.sources import Chosen
from tasks.runs.compose import features_to_log, load_adapted
from tasks.runs.config import RunConfig


def main() -> None:
    """A line for each number of beams."""
    parser = ArgumentParser()
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100, help="spread evenly over the validation data, in one batch")
    parser.add_argument("--beams", type=list[int], default=[1, 2, 3, 5])
    parser.add_class_arguments(RunConfig, None)
    values = parser.instantiate(parser.parse_args())
    config = RunConfig(**{name: values[name] for name in RunConfig.__dataclass_fields__})
    model, _ = load_adapted(values.adapter, encoder=config.encoder, language_model=config.language_model)
    val, task = config.data.val.open(), config.chosen_task()
    n_all = len(val.source)
    chosen = Chosen(val.source, range(0, n_all, max(n_all // values.images, 1))[: values.images])
    patches = features_to_log(model, chosen, config, "encoding")
    n = len(chosen)
    encoder, pad = model.row_encoder(), model.language.tokenizer.pad_token_id
    features = torch.stack([found for i in range(n) if isinstance(found := patches[i], Tensor)])
    batch = collate([encoder.prompt("") for _ in range(n)], range(n), features, kind=patches.kind, side="left", pad_id=pad)
    found = {beams: written(model, batch, config, beams) for beams in values.beams}
    for beams, (texts, scores) in found.items():
        metrics = task.score({chosen[i].image_id: text for i, text in enumerate(texts)}, chosen).metrics
        alike = model.generate_batch(batch, replace(config.generation, num_beams=beams))
        better = sum(one >= greedy - 1e-4 for one, greedy in zip(scores, found[values.beams[0]][1], strict=True))
        text, count = Counter(texts).most_common(1)[0]
        print(
            f"{beams} beams: {task.headline} {metrics[task.headline]:.2f}, {sum(map(len, map(str.split, texts))) / n:.1f} words, {texts.count('')} empty, "
            f"{len(set(texts))} different, {count} x {text!r}; log probability a token {sum(scores) / n:.2f}, as high as the first line's in {better} "
            f"of {n}; {sum(a == b for a, b in zip(texts, alike, strict=True))} of {n} equal to the uncached run"
        )


@torch.no_grad()
def written(model: Any, batch: Any, config: RunConfig, beams: int) -> tuple[Sequence[str], list[float]]:
    """Texts of transformers' own generation without a cache, and the mean log probability of each one's tokens."""
    language, n_prompt, tokenizer = model.language.model, batch.ids.shape[1], model.language.tokenizer
    with model.adapted.attachment.bind(model.token_map(batch)):
        ids = language.generate(
            input_ids=batch.ids, attention_mask=batch.attention_mask, max_new_tokens=config.generation.max_new_tokens, num_beams=beams,
            length_penalty=config.generation.length_penalty, do_sample=False, use_cache=False, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        new = ids[:, n_prompt:]
        mask = torch.cat([batch.attention_mask, torch.ones_like(new)], 1)
        scores = language(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, n_prompt - 1 : -1].float().log_softmax(-1)
    is_end = new == tokenizer.eos_token_id
    is_text = is_end.cumsum(1) - is_end.long() == 0  # up to the end token, and with it
    each = torch.take_along_dim(scores, new[..., None], 2)[..., 0] * is_text
    return generated_texts(model.language, batch, ids), (each.sum(1) / is_text.sum(1)).tolist()


if __name__ == "__main__":
    main()
