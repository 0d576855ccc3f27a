"""What may be asked of the connector of a model that sees already: that it is trained, or that methods act on it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from adalink.errors import ConfigError

__all__ = ["ConnectorChoice", "refuse_both", "refuse_connector"]

ConnectorChoice = Literal["frozen", "trained"]


def refuse_both(connector: ConnectorChoice, methods: Collection[str]) -> None:
    """Raise ConfigError where all of the connector's weights are trained, and methods, by name, would act on the frozen ones."""
    if connector == "trained" and methods:
        raise ConfigError(f"connector is trained, and connector_methods ({', '.join(methods)}) would act on its frozen weights: leave one of them out")


def refuse_connector(connector: ConnectorChoice, methods: Collection[str]) -> None:
    """Raise ConfigError where anything is asked of the connector of a composed model."""
    if connector != "frozen" or methods:
        given = "connector_methods" if methods else "connector"
        raise ConfigError(f"{given} was given without model: the connector of a composed model is a method, bridge, and trained; leave it out")
