"""Class names, colours and the two numberings of labels. The only module that converts them.

In training masks classes are 0..C-1 and 255 means "ignore"; on disk (canvas, mask pyramid,
GeoJSON) they are 1..C and 0 means "not analysed or outside tissue".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsiseg.errors import ConfigError

IGNORE = 255
"""Label of pixels that take no part in training or measuring."""

NOT_ANALYSED = 0
"""Label on disk of pixels outside tissue or never analysed."""

Colour = tuple[int, int, int]
_LONGEST_NAME = 200
"""Characters of a class name; each polygon of the class repeats it."""


@dataclass(frozen=True)
class TissueClass:
    """One class of a model.

    Attributes:
        name: shown in QuPath and in summaries; no ':' (QuPath derives classes from it), no
            trailing '*' (QuPath ignores such classes).
        colour: red, green, blue, each 0..255.
        background: whether the class is the rest ("other tissue"), which is in the mask but
            not exported as polygons unless all classes are asked for.
    """

    name: str
    colour: Colour
    background: bool = False

    def __post_init__(self) -> None:
        if not self.name.strip() or ":" in self.name or self.name.endswith("*"):
            raise ConfigError(
                f"class name {self.name!r}: must not be empty, hold ':' or end with '*'"
            )
        if len(self.name) > _LONGEST_NAME or any(c < " " for c in self.name):
            raise ConfigError(
                f"class name {self.name[:80]!r}: must have at most {_LONGEST_NAME} characters and "
                "no line breaks"
            )
        if len(self.colour) != 3 or not all(0 <= int(c) <= 255 for c in self.colour):
            raise ConfigError(f"colour of class {self.name!r}: three numbers from 0 to 255")


@dataclass(frozen=True)
class Classes:
    """The ordered classes of a model; class k of the network has value k + 1 on disk."""

    items: tuple[TissueClass, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.items) <= 254:
            raise ConfigError(f"{len(self.items)} classes: a model has 1 to 254")
        names = [c.name for c in self.items]
        if len(set(names)) != len(names):
            raise ConfigError(f"class names must differ: {', '.join(names)}")

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[TissueClass]:
        return iter(self.items)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in network order."""
        return tuple(c.name for c in self.items)

    def values(self) -> Iterator[tuple[int, TissueClass]]:
        """Pairs (value on disk 1..C, class)."""
        return enumerate(self.items, start=1)

    def lookup(self) -> npt.NDArray[np.uint8]:
        """(256, 3) uint8 colours by value on disk; 0 and unused values are black."""
        table = np.zeros((256, 3), np.uint8)
        for value, item in self.values():
            table[value] = item.colour
        return table

    def to_list(self) -> list[dict[str, Any]]:
        """The classes as JSON: one mapping each with value, name, colour and background."""
        return [
            {"value": v, "name": c.name, "color": list(c.colour), "background": c.background}
            for v, c in self.values()
        ]

    @classmethod
    def from_list(cls, rows: Sequence[Mapping[str, Any]]) -> Classes:
        """The reverse of `to_list`.

        Raises:
            ConfigError: names, colours or values that cannot be.
        """
        try:
            items = tuple(
                TissueClass(
                    str(r["name"]),
                    (int(r["color"][0]), int(r["color"][1]), int(r["color"][2])),
                    bool(r.get("background", False)),
                )
                for r in rows
            )
            values = [int(r.get("value", i)) for i, r in enumerate(rows, start=1)]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as e:
            raise ConfigError(
                f"classes: each needs a name and a color of three numbers ({e})"
            ) from e
        if values != list(range(1, len(values) + 1)):
            raise ConfigError(f"class values must be 1..{len(values)} in order, not {values}")
        return cls(items)


def to_disk(network: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
    """Network labels 0..C-1 (255 = ignore) as values on disk 1..C (0 = not analysed)."""
    values = np.asarray(network).astype(np.uint8)
    return np.where(values == IGNORE, np.uint8(NOT_ANALYSED), values + np.uint8(1)).astype(np.uint8)


def to_network(disk: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
    """Values on disk 1..C (0 = not analysed) as network labels 0..C-1 (255 = ignore)."""
    values = np.asarray(disk).astype(np.uint8)
    return np.where(values == NOT_ANALYSED, np.uint8(IGNORE), values - np.uint8(1)).astype(np.uint8)
