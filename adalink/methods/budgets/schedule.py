"""What a method does between the steps of a training: moves its budget, opens and closes gates, chooses the layers that learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from adalink.anatomy import Anatomy
from adalink.attachment.slots import depth_of
from adalink.edit import Adapter, Placement
from adalink.errors import CheckpointError
from adalink.tokens import DOMAIN_NAMES, N_DOMAINS

__all__ = ["OTHER", "Schedule", "Scheduled", "place_of"]

OTHER = "other"  # what is in no layer


class Schedule:
    """Called by the training loop around each optimizer step; this one does nothing. Steps count from 0, and those without anything to learn are left out.

    All processes make the same calls with the same weights and averaged gradients, so what is computed of them agrees. What is drawn must be a
    function of (seed, step).
    """

    def begin(self, n_steps: int, seed: int) -> None:
        """Called once, before the first step and before `load_state`: the run's last step, and its seed. Raises ConfigError where they do not fit."""

    def before_step(self, step: int, loss: Callable[[], float]) -> None:
        """Before the forward pass. `loss()` is the mean loss per target of the step's first micro-batch as the weights are, without gradients or dropout."""

    def loss(self, step: int) -> Tensor | None:
        """A scalar that is added to the step's mean loss, a function of the weights alone; None: nothing."""
        return None

    def after_backward(self, step: int) -> None:
        """Before gradients are clipped: they are whole, averaged over processes and unscaled. A gradient that is set to None lets a weight be."""

    def after_step(self, step: int) -> None:
        """After the optimizer's step, before the gradients are dropped: new weights, and the clipped gradients that led to them."""

    def report(self) -> Mapping[str, float]:
        """Numbers for the log and the curves of a run, such as how much of a budget is in use; asked for by every process where a line is written."""
        return {}

    def end(self) -> None:
        """After the last step, also where nothing was left to do. Raises ConfigError where what was learnt is of no use."""

    def state(self) -> Mapping[str, Tensor]:
        """What a run needs to go on exactly where it was, on any device; the adapter's folder does not hold it."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave. Raises CheckpointError where it is another method's, or of other groups or places."""
        own = self.state()
        if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in state.items()}:
            differ = sorted(own.keys() ^ state.keys()) or sorted(key for key, value in own.items() if value.shape != state[key].shape)
            raise CheckpointError(f"the state of {type(self).__name__} is of other groups or targets: {', '.join(differ[:4])} differ")
        for key, value in own.items():
            value.copy_(state[key])


@runtime_checkable
class Scheduled(Protocol):
    """A method that has a schedule."""

    def schedule(self, name: str, adapter: Adapter) -> Schedule:
        """A new one for a training of `adapter`, in which the method is called `name`: its placements' roles begin with `name.`.

        A plain `Schedule` where there is nothing to do, as for a method that is not trained.
        """


def place_of(placement: Placement, anatomy: Anatomy, *, by_domain: bool) -> str:
    """Which layer a placement is in: `3`, or `3.image` where token domains count apart; `other` for what is in no layer."""
    depth = depth_of(anatomy, placement.port)
    layer = str(depth) if 0 <= depth < len(anatomy.layers) else OTHER
    known = {number: word for word, number in DOMAIN_NAMES.items()}
    domains = ["all"] if len(placement.domains) == N_DOMAINS else [known.get(domain, str(domain)) for domain in placement.domains]
    return f"{layer}.{'_'.join(domains)}" if by_domain else layer
