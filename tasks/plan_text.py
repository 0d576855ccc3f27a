"""A plan on the screen, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from tasks.plan import PartPlan, Plan

__all__ = ["plan_as_json", "plan_as_text"]

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def plan_as_text(plan: Plan) -> str:
    """The plan for a reader: parts, methods, positions, memory."""
    share = 100 * plan.trained / (plan.trained + plan.frozen)
    slots = ", ".join(f"{n} {domain}" for domain, n in plan.slots.items()) or "none"
    words = "not counted (no tokenizer beside the config)" if plan.prompt_tokens is None else f"{plan.prompt_tokens} words of an empty question"
    assumed = plan.assumed
    lines = [
        *_part("encoder", plan.encoder),
        *_part("language model", plan.language_model),
        f"{'methods':<15} {len(plan.methods)}",
        *(line for method in plan.methods for line in (f"  {method.name:<13} {method.trained:,} trained", *(f"    {edit}" for edit in method.edits))),
        f"{'trained':<15} {plan.trained:,} of {plan.trained + plan.frozen:,} parameters ({share:.4f} %)",
        f"{'tokens':<15} {plan.tokens_per_image} per image; slots of a row: {slots}; prompt: {words}",
        *_memory("to train", plan.memory_to_train, f"{assumed.rows} rows of {sum(plan.slots.values()) + assumed.text} tokens"),
        *_memory("to serve", plan.memory_to_serve, f"{assumed.generated} generated tokens, {assumed.beams} beam{'s' * (assumed.beams > 1)}"),
    ]
    return "\n".join(lines)


def plan_as_json(plan: Plan) -> str:
    """The plan as JSON, with the sums."""
    return json.dumps({**dataclasses.asdict(plan), "trained": plan.trained, "frozen": plan.frozen}, indent=2)


def size(n_bytes: int) -> str:
    """`4.2 GiB`; whole bytes below one KiB."""
    value, unit = float(n_bytes), UNITS[0]
    for unit in UNITS:
        if value < 1024 or unit == UNITS[-1]:
            break
        value /= 1024
    return f"{n_bytes} B" if unit == "B" else f"{value:.1f} {unit}"


def _part(role: str, part: PartPlan) -> list[str]:
    indent = " " * 16
    unknown = "not known: no weights here, or names that only loading resolves"
    return [
        f"{role:<15} {part.name}: {part.kind}, {part.parameters:,} frozen parameters in {part.dtype} ({size(part.bytes)})",
        indent + part.shape,
        f"{indent}fingerprint {part.fingerprint or unknown}",
    ]


def _memory(what: str, parts: Mapping[str, int], assumed: str) -> list[str]:
    lines = [f"  {name:<38} {size(n):>10}" for name, n in parts.items()]
    return [f"{'memory ' + what:<15} about {size(sum(parts.values()))} ({assumed})", *lines]
