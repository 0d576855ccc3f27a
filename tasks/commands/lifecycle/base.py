"""`adalink slim`, `slice`, `probe` and `steer`: a frozen language model made smaller, or moved along a direction, with what that costs."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adalink.errors import ConfigError
from adalink.files import new_folder, refuse_full
from tasks.commands import Command

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from torch import Tensor

    from multimodal.language import Language

__all__ = ["PROBE", "SLICE", "SLIM", "STEER", "fit_probe", "slice_base", "slim_base", "steer_base"]

PROBE_FILE_KEY, BATCH, ROUNDS, FEW = "probe", 16, 3, 8


def slim_base(*, language_model: str, out: Path, texts: Path, ratio: float = 3.0, steps: int = 0, learning_rate: float = 1e-3) -> None:
    """Write a language model whose linears are products of two smaller ones (PELA), beside its base; `--language_model OUT` then loads it.

    Its fingerprint is another one: adapters of the base are refused on it. Without distillation (`--steps`) a slim base is bad.

    Raises ConfigError for steps or rates that are none.

    Args:
        language_model: The base: a local folder in the format of transformers, a hub name, or scenes:language.
        out: A new or empty folder. It names the base, which must stay where it is.
        texts: A text file, one text a line: what loss and speed are measured on, the last fifth alone where the others are distilled on.
        ratio: The share of a linear's weights that is left is one in so many; 1 or more.
        steps: Steps of distillation: the factors learn to give what the base gives; 0 for none.
        learning_rate: Of the distillation.
    """
    from adalink import fingerprint
    from adalink.lifecycle.base import distil, slim_linears, slim_names, write_slim

    if steps < 0 or not learning_rate > 0:
        raise ConfigError(f"steps is {steps} and learning_rate {learning_rate}: give 0 or more steps, and a positive rate")
    refuse_full(out)
    lines, language = _lines(texts), _loaded(language_model)
    slim_names(language.model, ratio)
    n = len(lines) - max(1, len(lines) // 5) if steps else 0
    held = _batches(language, lines[n:])
    slim = copy.deepcopy(language.model)
    linears = slim_linears(slim, ratio)
    rows = {"base": language.model, "slim": copy.deepcopy(slim) if steps else slim}
    if steps:
        distil(language.model, slim, _batches(language, lines[:n]), steps, learning_rate)
        rows["distilled"] = slim
    report = _report(rows, held)
    with new_folder(out) as folder:
        language.model.config.save_pretrained(folder)
        language.tokenizer.save_pretrained(folder)
        write_slim(folder, language.name, fingerprint(language.model), ratio, linears, report)
    print(f"wrote {out}: {language_model} with {len(linears)} linears of low rank, by a ratio of {ratio:g}")


def slice_base(*, language_model: str, out: Path, texts: Path, shares: Sequence[float]) -> None:
    """Write a language model with a share of its feed-forward units, as a plain folder of transformers (MatFormer).

    A model that was not trained with nested shares falls apart: see the loss that is printed.

    Args:
        language_model: A local folder in the format of transformers, a hub name, or scenes:language.
        out: A new or empty folder.
        texts: A text file, one text a line: what loss and speed are measured on.
        shares: Of the units, above 0 and at most 1: one for all layers, or one for each where the family's config has one for each (Gemma 3n).
    """
    from adalink.lifecycle.base import set_units, slice_units
    from multimodal.loading import quiet

    refuse_full(out)
    lines, language = _lines(texts), _loaded(language_model)
    model = copy.deepcopy(language.model)
    left = slice_units(model, shares)
    set_units(model, left)
    report = _report({"base": language.model, "slice": model}, _batches(language, lines))
    with new_folder(out) as folder, quiet():
        model.save_pretrained(folder)
        language.tokenizer.save_pretrained(folder)
    print(f"wrote {out}: {', '.join(map(str, dict.fromkeys(left)))} feed-forward units in each of {len(left)} layers")
    if report["slice"]["loss"] > 1.1 * report["base"]["loss"]:
        print("the loss has grown by more than a tenth: this model was not trained to be sliced so far, so give a larger share, or train it on")


def fit_probe(*, language_model: str, negative: Path, positive: Path, out: Path, seed: int = 0) -> None:
    """Fit a linear probe that tells two kinds of texts apart by the model's last hidden states, for `adalink steer`.

    Raises ConfigError where it is right in less than 60 % of the fifth of the texts that it is not fitted to.

    Args:
        language_model: A local folder in the format of transformers, a hub name, or scenes:language.
        negative: A text file, one text a line, of the kind to move away from.
        positive: The same of the kind to move towards.
        out: The file to write, such as probe.safetensors.
        seed: Of which texts are held out.
    """
    import torch
    from safetensors.torch import save_file

    from adalink.lifecycle.base import fitted_probe

    if out.exists():
        raise ConfigError(f"{out} is there already: give another name, or remove it")
    kinds, language = [_lines(file) for file in (negative, positive)], _loaded(language_model)
    states = [torch.cat([_states(language.model, *batch) for batch in _batches(language, lines)]) for lines in kinds]
    v, right = fitted_probe(states[0], states[1], seed)
    save_file({PROBE_FILE_KEY: v.float().contiguous()}, out, {"language_model": language_model, "held_out": f"{right:.3f}"})
    print(f"wrote {out}: a direction of {len(v)} numbers, right in {100 * right:.0f} % of {sum(map(len, states)) // 5} held-out texts")


def steer_base(
    *, language_model: str, probe: Path, out: Path, alpha: float, rows: int, layers: Sequence[int] = (), domains: Sequence[str] = ("all",)
) -> None:
    """Write an adapter that moves the gates of a language model along a probe's direction (Model Surgery): a LoRA of rank 1 that comes off again.

    Every command reads it; `adalink export merged` puts it into the weights, as published.

    Raises ConfigError for a file that is no probe.

    Args:
        language_model: A local folder in the format of transformers, a hub name, or scenes:language.
        probe: The file of `adalink probe`.
        out: A new or empty folder.
        alpha: How far, in lengths of the probe.
        rows: How many gates: those that point away from the direction most, over all layers together.
        layers: Numbers of the layers, from 0; none for all.
        domains: The tokens that it is for, such as answer; by default all.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from adalink import AdaptedModel
    from adalink.lifecycle.base import closest_rows, steered
    from multimodal.encoders.bound_parts import language_part

    refuse_full(out)
    try:
        v = load_file(probe)[PROBE_FILE_KEY]
    except (OSError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{probe} is no probe that can be read ({error}): `adalink probe` writes one") from None
    language = _loaded(language_model)
    chosen = closest_rows(language.model, v, rows, layers)
    group = "all" if tuple(domains) == ("all",) else "steered"
    made = steered(language.model, v, alpha, chosen, {group: tuple(domains)})
    adapted = AdaptedModel(language.model, parts={"language_model": language_part(language)})
    adapter = adapted.add_adapter("steer", {"lora": made.method})
    with torch.no_grad():
        for name, tensor in adapter.named_parameters():
            tensor.copy_(made.tensors[name])
    adapted.save_pretrained(out)
    counts = [sum(layer == one for layer, _ in chosen) for one in sorted({layer for layer, _ in chosen})]
    print(f"wrote {out}: {rows} gates in {len(counts)} layers, moved by {alpha:g} times the probe")


def _loaded(name: str) -> Language:
    from multimodal.language import load_language
    from tasks.runs.compose import found_part, located

    found = found_part(name)
    return load_language(located(str(found)))


def _lines(path: Path) -> list[str]:
    from tasks.data.files import read_lines

    if len(lines := read_lines(path, "text")) < 2:
        raise ConfigError(f"{path} has {len(lines)} texts: give two or more, one a line")
    return lines


def _batches(language: Language, lines: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """ids and mask, int64 [B, T] each, padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(language.tokenizer(line)["input_ids"][: language.max_positions]) for line in lines]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ConfigError("no text has two tokens or more: give longer texts")
    parts = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
    masks = [pad_sequence([torch.ones_like(row) for row in part], batch_first=True) for part in parts]
    return [(pad_sequence(part, batch_first=True, padding_value=language.tokenizer.pad_token_id), mask) for part, mask in zip(parts, masks, strict=True)]


def _states(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """float [B, D]: the last hidden states, their mean over the tokens."""
    import torch

    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1].float()
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class _Row(NamedTuple):
    model: Any
    seconds: list[float]
    losses: list[float]
    features: float  # the mean squared difference of its block outputs to the base's


def _report(models: dict[str, Any], batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """Print and give for each model its size, the loss of a token, how far its block outputs are from the base's (the first's), and its speed.

    Speed is a median of alternated readings.
    """
    import torch

    base = next(iter(models.values()))
    rows = {name: _Row(model, [], [], _feature_loss(model, base, batches)) for name, model in models.items()}
    n_tokens = sum(int(mask.sum()) for _, mask in batches)
    for _ in range(ROUNDS):
        for row in rows.values():
            started, total = time.perf_counter(), 0.0
            with torch.no_grad():
                for ids, mask in batches:
                    total += float(row.model(input_ids=ids, attention_mask=mask, labels=torch.where(mask == 1, ids, -100)).loss) * int(mask[:, 1:].sum())
            row.seconds.append(time.perf_counter() - started)
            row.losses.append(total / (n_tokens - sum(len(ids) for ids, _ in batches)))
    report = {name: _measured(row, n_tokens) for name, row in rows.items()}
    print(f"{'':<10} {'parameters':>12} {'bytes':>13} {'loss':>7} {'features':>9} {'tokens/s':>9}")
    for name, one in report.items():
        print(f"{name:<10} {one['parameters']:12,.0f} {one['bytes']:13,.0f} {one['loss']:7.3f} {one['features']:9.4f} {one['tokens_per_second']:9,.0f}")
    return report


def _feature_loss(model: Any, base: Any, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    import torch

    from adalink.lifecycle.base import feature_loss

    found = []
    with torch.no_grad():
        for ids, mask in batches[:FEW]:
            own, wanted = (one(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:-1] for one in (model, base))
            found.append(float(feature_loss(own, wanted, mask)) if own else 0.0)
    return statistics.mean(found)


def _measured(row: _Row, n_tokens: int) -> dict[str, float]:
    parameters = list(row.model.parameters())
    return {
        "parameters": sum(one.numel() for one in parameters),
        "bytes": sum(one.numel() * one.element_size() for one in parameters),
        "loss": row.losses[-1],
        "features": row.features,
        "tokens_per_second": n_tokens / statistics.median(row.seconds),
    }


SLIM = Command.of(slim_base, "adalink slim --language_model my-model --texts captions.txt --ratio 3 --steps 200 --out slim")
SLICE = Command.of(slice_base, "adalink slice --language_model my-model --texts captions.txt --shares '[0.5]' --out half")
PROBE = Command.of(fit_probe, "adalink probe --language_model my-model --negative a.txt --positive b.txt --out v.safetensors")
STEER = Command.of(steer_base, "adalink steer --language_model my-model --probe v.safetensors --alpha 2 --rows 64 --out steered")
