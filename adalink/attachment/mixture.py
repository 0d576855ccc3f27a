"""Several adapters that serve one row together, each by a weight of the row: WEMoE's mixture (arXiv 2402.00433) of outputs, decided once for each row.

    h' = h + sum_k g_k (chain_k(h) - h)          chain_k: all edits of adapter k at a port, in their order

For edits that are linear in their weights this is the adapter with the weights W_0 + sum_k g_k tau_k. A weight of 1 among others of 0 is that adapter, to
the last bit. The weights stand in the token map (`TokenMap.weights`), so they hold for every token, beam and refill of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from adalink.attachment.attachment import Run, runs_of
from adalink.attachment.inputs import Route
from adalink.edit import Adapter, Placement, Port
from adalink.errors import AttachError, ConfigError
from adalink.tokens import Tokens

__all__ = ["Mixed", "Mixture"]

SIDES = ("embedding", "input", "output", "returned", "foreseen")  # ports whose values can be mixed; a mask or a position cannot
SURE = 1e-6  # how far from one a sum of weights may be


class Mixed(nn.Module):
    """The chains of several adapters at one port, each with the row's weight of its adapter."""

    def __init__(self, chains: Sequence[tuple[Run, ...]]) -> None:
        super().__init__()
        self.chains = tuple(chains)  # no children: the adapters own their edits

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        if tokens.weights is None:
            raise AttachError("a row is served by a mixture of adapters, and the token map has no weights: name its route (VisionLanguageModel.route)")
        weights = tokens.weights.to(h.device, h.dtype)[:, :, None, None]
        mixed = (1 - weights.sum(1)) * h  # nothing where they sum to one: a bridge writes, whatever stood there
        for k, chain in enumerate(self.chains):
            value = h
            for run in chain:
                value = run(value, tokens, x)
            mixed = mixed + weights[:, k] * value
        return mixed


class Mixture(Adapter):
    """Adapters of one model as one, under a row index of its own; it has no weights that are its own.

    Raises ConfigError where they cannot be mixed: slots that differ, a gate over the row, masks or positions of one adapter's own.
    """

    def __init__(self, members: Mapping[str, Adapter], index: int) -> None:
        nn.Module.__init__(self)
        self.methods, self.copies, self.names = {}, {}, tuple(members)
        self.slots = next(iter(members.values())).slots
        for name, member in members.items():
            _check(name, member, self.slots)
        ports = dict.fromkeys(placement.port for member in members.values() for placement in member.placements)
        self.placements = tuple(self._at(port, number, members, index) for number, port in enumerate(ports))

    def _at(self, port: Port, number: int, members: Mapping[str, Adapter], index: int) -> Placement:
        here = [[(index, placement) for placement in member.placements if placement.port == port] for member in members.values()]
        domains = tuple(sorted({domain for placed in here for _, placement in placed for domain in placement.domains}))
        return Placement(f"mixed{number}", port, Mixed([runs_of(placed) for placed in here]), domains, reads_row=True)

    def weights_of(self, name: str | None) -> list[float]:
        """K numbers of a row, zeros where it is none of the mixture's. Raises ConfigError for weights of others, or of bridges that do not sum to one."""
        weights = name.weights if isinstance(name, Route) else {}
        if stray := [other for other in weights if other not in self.names]:
            raise ConfigError(f"a route has a weight for {stray[0]}, and the mixture is of {', '.join(self.names)}: give weights of these")
        if self.slots and weights and abs(sum(weights.values()) - 1) > SURE:
            raise ConfigError(f"the weights {dict(weights)} sum to {sum(weights.values()):.4g}, and adapters that fill slots need shares of one: give such")
        return [weights.get(own, 0.0) for own in self.names]


def _check(name: str, member: Adapter, slots: tuple[object, ...]) -> None:
    odd = [placement.port.side for placement in member.placements if placement.port.side not in SIDES]
    why = f"changes the {odd[0]} of a layer" if odd else "has a gate over its row" if any(placement.reads_row for placement in member.placements) else ""
    why = why or ("has trained copies of modules" if member.copies else "" if member.slots == slots else "reserves other slots than the first")
    if why:
        raise ConfigError(f"the adapter {name} {why}, so it cannot be mixed with others: let one adapter serve each row (--top 1)")
