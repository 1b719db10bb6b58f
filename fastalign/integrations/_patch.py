"""Names of another library replaced by ours until that is undone."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

Place = tuple[str, str]
"""A module, and a name in it."""


class Patch:
    """A patch in force; ``undo``, or the end of a ``with`` block, gives the library its own functions back.

    Patches of the same names may nest: the library's own return with the last one.
    """

    theirs: ClassVar[dict[Place, list[Any]]] = {}
    """The library's own, once for each patch in force."""

    def __init__(self, ours: Mapping[Place, Any]) -> None:
        found = {(module, name): getattr(import_module(module), name) for module, name in ours}
        for place, function in ours.items():
            kept = self.theirs.setdefault(place, [])
            kept.append(kept[0] if kept else found[place])
            setattr(import_module(place[0]), place[1], function)
        self.places = list(ours)

    def undo(self) -> None:
        """End the patch; undoing twice does nothing."""
        while self.places:
            module, name = place = self.places.pop()
            own = self.theirs[place].pop()
            if not self.theirs[place]:
                setattr(import_module(module), name, own)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
