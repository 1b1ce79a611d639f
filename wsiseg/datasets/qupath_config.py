"""Options of annotated slides, and which class of QuPath is which of ours. Knows no pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wsiseg.classes import IGNORE, Classes, Colour, TissueClass
from wsiseg.datasets.annotations import Annotation
from wsiseg.datasets.checks import alike
from wsiseg.errors import ConfigError, DatasetError

_COLOURS: tuple[Colour, ...] = (
    (200, 60, 60),
    (60, 160, 75),
    (60, 90, 200),
    (220, 190, 40),
    (150, 70, 180),
    (50, 180, 190),
    (230, 130, 40),
    (140, 110, 80),
)
_REST: Colour = (205, 205, 215)


@dataclass(frozen=True)
class QuPathClass:
    """One class of the network."""

    name: str
    """Its name."""
    color: tuple[int, int, int]
    """Red, green, blue, 0 to 255."""
    background: bool = False
    """Whether it is the rest, not exported as polygons."""
    qupath: tuple[str, ...] = ()
    """Names of the classes in QuPath that it stands for; empty: its own name."""


@dataclass(frozen=True)
class QuPathConfig:
    """Options of the data set."""

    mpp: float = 0.5
    """Micrometres per pixel of the patches."""
    patch_px: int = 1024
    """Side of the patches."""
    stride_px: int | None = None
    """From one patch to the next; none: patch_px, side by side."""
    min_labelled: float = 0.01
    """Share of a patch that must be annotated."""
    classes: tuple[QuPathClass, ...] = ()
    """Classes in network order; empty: those found in the files, sorted by name, in their colours
    of QuPath."""
    ignore: tuple[str, ...] = ()
    """Names of classes in QuPath whose area is not labelled. Classes that end in '*', which QuPath
    ignores itself, are always so."""
    region: str = "Region*"
    """Class (or name) of the annotations inside which everything is annotated."""
    background: str | None = None
    """Class of what is not annotated inside such a region, such as 'Other tissue'; none: it is
    not labelled, and regions mean nothing."""
    objects: tuple[Literal["annotation", "detection", "cell", "tile"], ...] = (
        "annotation",
        "detection",
    )
    """Which objects of QuPath count."""
    coords: Literal["qupath", "openslide"] = "qupath"
    """Origin of slides that state their bounds: cropped to them, as QuPath does, or not."""
    mpp_override: float | None = None
    """Micrometres per pixel of the slides' level 0, over what they state."""
    test: tuple[str, ...] = ()
    """Slides, without suffix, of the part `test`; the others are the part `train`."""

    def __post_init__(self) -> None:
        for name in ("mpp", "mpp_override"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} {value}: must be above 0")
        if self.patch_px < 1 or (self.stride_px is not None and self.stride_px < 1):
            raise ConfigError("patch_px and stride_px must be at least 1")
        if not 0 <= self.min_labelled <= 1:
            raise ConfigError(f"min_labelled {self.min_labelled}: must be from 0 to 1")
        names = [q for c in self.classes for q in (c.qupath or (c.name,))] + list(self.ignore)
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ConfigError(f"the QuPath class {twice[0]!r} is given twice")
        pair = alike(c.name for c in self.classes)
        if pair:
            raise ConfigError(
                f"classes: {pair[0]!r} and {pair[1]!r} differ only in case or spaces; make one "
                "class of them, with both names in its list `qupath`, or rename one"
            )
        if self.classes and self.background not in (None, *(c.name for c in self.classes)):
            raise ConfigError(f"background {self.background!r}: must be one of the classes")


def is_region(config: QuPathConfig, annotation: Annotation) -> bool:
    """Whether an annotation bounds a fully annotated region."""
    return config.region in (annotation.class_name, annotation.label) and config.region != ""


def classes_of(config: QuPathConfig, files: Sequence[tuple[Path, Sequence[Annotation]]]) -> Classes:
    """The classes of the options, or where those name none the classes of the annotations.

    Raises:
        DatasetError: annotations have classes that the options do not name, or without such
            options names that differ only in case or spaces, or fewer than two classes.
    """
    found: dict[str, tuple[Path, Colour | None]] = {}
    for path, items in files:
        for a in items:
            ignored = a.class_name in config.ignore or a.class_name.endswith("*")
            if a.class_name and not ignored and not is_region(config, a):
                first, colour = found.get(a.class_name, (path, None))
                found[a.class_name] = (first, colour or a.colour)
    if not config.classes:
        _check_spelling(config, {n: path for n, (path, _) in found.items()})
        return _found_classes(config, {n: colour for n, (_, colour) in found.items()})
    known = {q for c in config.classes for q in (c.qupath or (c.name,))}
    stray = sorted(set(found) - known)
    if stray:
        raise DatasetError(
            f"{found[stray[0]][0]}: classes that the options do not name: {', '.join(stray)}; add "
            "them to `classes` (or to the list `qupath` of a class), or to `ignore`"
        )
    return Classes(tuple(TissueClass(c.name, c.color, c.background) for c in config.classes))


def labels_of(config: QuPathConfig, classes: Classes) -> dict[str, int]:
    """Label by name of a class in QuPath; 255 of those in `ignore`."""
    rows = enumerate(config.classes)
    labels = {q: i for i, c in rows for q in (c.qupath or (c.name,))}
    if not labels:
        labels = {name: i for i, name in enumerate(classes.names)}
    return {**labels, **dict.fromkeys(config.ignore, IGNORE)}


def _check_spelling(config: QuPathConfig, found: dict[str, Path]) -> None:
    places = {name: path.name for name, path in found.items()}
    if config.background:
        places.setdefault(config.background, "option background")
    pair = alike(sorted(places))
    if pair:
        a, b = pair
        raise DatasetError(
            f"the classes {a!r} ({places[a]}) and {b!r} ({places[b]}) differ only in case or "
            f"spaces; rename one, or give the option `classes` with a class of both, such as "
            f'{{name: {a}, color: [200, 0, 0], qupath: ["{a}", "{b}"]}}, in a copy of '
            "configs/datasets/qupath.yaml for --dataset"
        )


def _found_classes(config: QuPathConfig, found: dict[str, Colour | None]) -> Classes:
    names = sorted({*found, *([config.background] if config.background else [])})
    derived = [n for n in names if ":" in n]
    if derived:
        raise DatasetError(
            f"the annotations have the derived class {derived[0]!r}; give the option `classes` "
            "with it in the list `qupath` of a class, or `ignore` it"
        )
    if len(names) < 2:
        raise DatasetError(
            f"annotations of one class only ({', '.join(names)}); annotate a second, or draw a "
            f"{config.region} annotation and set `background` to the class of the rest inside it"
        )
    items = []
    for i, name in enumerate(names):
        rest = name == config.background
        colour = found.get(name) or (_REST if rest else _COLOURS[i % len(_COLOURS)])
        items.append(TissueClass(name, colour, rest))
    return Classes(tuple(items))
