"""Where the edits of an adapter go, in words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from adalink import Adapter, Placement, Slots
from adalink.tokens import DOMAIN_NAMES, N_DOMAINS

__all__ = ["domain_names", "places_of", "slots_of"]

# Sides of a port where what is edited is not a hidden state, as a reader would call it.
_SIDES = {"mask": "attention mask", "position": "position ids", "vectors": "position vectors", "cache": "cache", "distances": "distance biases",
          "reader": "decoder's mask", "returned": "output", "foreseen": "input"}  # fmt: skip


def places_of(adapter: Adapter) -> dict[str, tuple[str, ...]]:
    """Method -> its places, each as `output of layers.0..11.self_attn.q_proj, for image`: one line for the same module of many layers."""
    return {name: _places([one for one in adapter.placements if one.role.split(".", 1)[0] == name]) for name in adapter.methods}


def slots_of(slots: Sequence[Slots]) -> dict[str, int]:
    """Domain -> how many positions of a row are reserved for it."""
    counts: dict[str, int] = {}
    for slot in slots:
        counts[domain_names((slot.domain,))] = counts.get(domain_names((slot.domain,)), 0) + slot.count
    return counts


def domain_names(domains: Sequence[int]) -> str:
    """`text, answer`; a domain without a name is its number, and all of them are every token."""
    if set(domains) == set(range(N_DOMAINS)):
        return "every token"
    names = {number: name for name, number in DOMAIN_NAMES.items()}
    return ", ".join(names.get(domain, str(domain)) for domain in domains)


def _places(placements: Sequence[Placement]) -> tuple[str, ...]:
    layers: dict[tuple[str, str], list[int]] = {}
    for one in placements:
        pattern = re.sub(r"\b\d+\b", "*", one.port.module)
        side = _SIDES.get(one.port.side, one.port.side)
        found = layers.setdefault((f"{side} of {pattern}" if pattern else side, domain_names(one.domains)), [])
        found += [int(number) for number in re.findall(r"\b\d+\b", one.port.module)[:1]]
    return tuple(f"{where.replace('*', _listed(numbers), 1)}, for {domains}" for (where, domains), numbers in layers.items())


def _listed(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> `0..2,5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
