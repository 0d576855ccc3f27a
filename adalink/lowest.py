"""How deep an adapter begins: below its lowest edit a frozen model makes of a text what its tokens alone decide, whatever is learnt."""

from __future__ import annotations

from adalink.anatomy import Anatomy
from adalink.edit import Adapter, Placement, Port
from adalink.masks import HideKeys
from adalink.positions import Uncounted, ZeroVector

__all__ = ["lowest_edit"]

# Edits that nothing is learnt in and that read no picture: domains alone decide what they do.
FIXED = (HideKeys, Uncounted, ZeroVector)


def lowest_edit(anatomy: Anatomy, adapter: Adapter) -> tuple[int, Placement]:
    """The number of the lowest layer that the adapter acts in, and the edit that does: -1 before the layers, as many as there are after them.

    What hides a slot and keeps it out of the count of positions is passed over. eP-ALM in the layers 6 to 12 -> 6, and its first tap.
    """
    found = [(_depth(anatomy, placement.port), placement) for placement in adapter.placements if not isinstance(placement.edit, FIXED)]
    return min(found, key=lambda one: one[0])


def _depth(anatomy: Anatomy, port: Port) -> int:
    if port.module == anatomy.final_norm:
        return len(anatomy.layers)
    return next((number for number, layer in enumerate(anatomy.layers) if f"{port.module}.".startswith(f"{layer}.")), -1)
