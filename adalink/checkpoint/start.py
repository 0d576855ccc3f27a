"""The start of an adapter: its weights before any training, drawn again from a seed and checked by a digest, so that no folder stores them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adalink.edit import Adapter
from adalink.errors import CheckpointError

__all__ = ["Start", "digest_of", "redrawn", "seeded", "start_from_json", "start_of_new"]


@dataclass(frozen=True)
class Start:
    """What an adapter started from.

    seed    of torch's generator on the CPU, right before the weights were drawn
    digest  16 hex digits of the weights that were drawn
    """

    seed: int
    digest: str


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of weights: of their names, sorted, and of their values in float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def seeded() -> Iterator[int]:
    """Inside the block, what torch draws on the CPU is what follows the seed that comes back.

    Right after torch.manual_seed that is its own seed, and nothing changes; elsewhere a new one is drawn, and the generator goes on after that draw.
    """
    seed = torch.initial_seed()
    if torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state()):
        yield seed
        return
    with torch.device("cpu"):
        seed = int(torch.randint(2**31, ()))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield seed


def start_of_new(seed: int, adapter: Adapter) -> Start | None:
    """The start of an adapter that was just drawn; None where it has no values (a plan's)."""
    tensors = adapter.tensors()
    return None if any(tensor.is_meta for tensor in tensors.values()) else Start(seed, digest_of(tensors))


def redrawn(start: Start, make: Callable[[], Adapter], states: tuple[Tensor, ...] = ()) -> Adapter:
    """A new adapter with the weights of the start; torch's generator is then as it was.

    make    makes an adapter of the same methods on the same frozen model
    states  of the generator, which are tried where the seed alone gives other weights: for a run that drew something else first

    Raises CheckpointError where none of them gives the weights that the digest stands for.
    """
    for state in (torch.Generator().manual_seed(start.seed).get_state(), *states):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            adapter = make()
        if (found := digest_of(adapter.tensors())) == start.digest:
            return adapter
    raise CheckpointError(
        f"the start of the adapter cannot be drawn again: seed {start.seed} gives weights with the digest {found}, and {start.digest} was expected; "
        "draw it with the version of torch and on the kind of processor that it was trained with"
    )


def start_from_json(content: Any) -> Start | None:
    """A start from a config. Raises KeyError, TypeError or ValueError where something does not fit."""
    return None if content is None else Start(int(content["seed"]), str(content["digest"]))
