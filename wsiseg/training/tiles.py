"""Unlabelled tissue for pretraining: folders of images and slides, sampled as crops.

Knows no networks. Images are held out by group, so that what is measured on them was not trained
on.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wsiseg.errors import ConfigError, DatasetError, ResolutionError, SlideError, WsisegError
from wsiseg.training.tile_files import ImageCache, OpenSlides, TissueFile, open_file
from wsiseg.training.tile_pool import TilePool

__all__ = ["Pools", "SourceConfig", "TilePool", "load_pools", "other_files"]


@dataclass(frozen=True)
class SourceConfig:
    """One source of unlabelled tissue."""

    path: str
    """Glob below the data folder, of images or slides."""
    mpp: float | None = None
    """Micrometres per pixel of the images; None: unknown, used as they are (slides: their own)."""
    weight: float = 1.0
    """Share of the crops that come from this source, against the other sources' weights."""
    exclude: str = ""
    """Glob of file names to leave out (annotations, test images)."""
    group: str = ""
    """Regular expression in the file name; files in which it finds the same are held out together
    (its first bracket, if it has one). Empty: each file by itself."""
    label: str = ""
    """Class of all files of the source, for measuring the encoder only; empty: none."""

    def __post_init__(self) -> None:
        if not self.path or Path(self.path).is_absolute():
            raise ConfigError(f"source path {self.path!r}: must be relative to the data folder")
        if not self.weight > 0 or (self.mpp is not None and not self.mpp > 0):
            raise ConfigError(f"source {self.path}: weight and mpp must be above 0")
        try:
            re.compile(self.group)
        except re.error as e:
            raise ConfigError(f"source {self.path}: group is not a regular expression ({e})") from e

    def group_of(self, path: Path) -> str:
        """The group of a file; its name where the expression finds nothing."""
        found = re.search(self.group, path.name) if self.group else None
        if found is None:
            return path.name
        return str(found.group(1) if found.re.groups else found.group(0))


class Pools(NamedTuple):
    """What is trained on, and what is kept for measuring; None where nothing is held out."""

    training: TilePool
    held_out: TilePool | None
    slides: OpenSlides

    @property
    def measured(self) -> TilePool:
        """What is measured on: what is held out, else the training images."""
        return self.training if self.held_out is None else self.held_out

    @property
    def held_out_images(self) -> int:
        """Number of held-out images and slides."""
        return 0 if self.held_out is None else len(self.held_out)

    def record(self, root: Path) -> str:
        """Which files are trained and measured on, as text; see `other_files`."""
        held_out = [] if self.held_out is None else self.held_out.names(root)
        return json.dumps({"training": self.training.names(root), "held out": held_out})


def other_files(kept: str, now: str) -> str:
    """How `Pools.record` of now differs from one that was kept, and what to do; empty if not."""
    if kept == now:
        return ""
    then, names = _names(kept), _names(now)
    if gone := sorted(then - names):
        return f"with {gone[0]}, which is not there or cannot be used now; put it back, or"
    if new := sorted(names - then):
        return f"without {new[0]}; take it away, or"
    return "with other files, or by another version of wsiseg;"


def _names(record: str) -> set[str]:
    """All files of a record; none of what is no record."""
    try:
        return {n for side in json.loads(record).values() for source in side for n in source}
    except (ValueError, AttributeError, TypeError):
        return set()


def load_pools(
    sources: Sequence[SourceConfig],
    root: Path,
    *,
    mpp: float,
    validation_share: float = 0.0,
    seed: int = 0,
    memory_gb: float = 4.0,
) -> Pools:
    """Find the files of all sources, the tissue of their slides, and divide them.

    Of each source the groups that hold out `validation_share` of them, rounded up, are drawn by
    the seed, but never more than half; one with a single group is trained on. A file that several
    sources name, and a group that their expressions find, is on one side for all of them. Files in
    which an expression finds nothing are warned of; so are files that cannot be used, without which
    the rest is divided.

    Args:
        sources: what to read.
        root: folder that their paths are relative to.
        mpp: micrometres per pixel to bring images of known resolution to.
        validation_share: share of the groups to hold out; 0 = none.
        seed: seed of the division.
        memory_gb: bound on the decoded images that are held, in 10^9 bytes.

    Raises:
        DatasetError: a source matches no file, or none that can be used.
    """
    cache, slides = ImageCache(round(memory_gb * 1e9)), OpenSlides()
    files: dict[tuple[Path, float | None], TissueFile | str] = {}
    sides: dict[Path, bool] = {}
    groups_held: dict[str, bool] = {}
    training: list[list[TissueFile]] = []
    held: list[list[TissueFile]] = []

    def open_(path: Path, own_mpp: float | None) -> TissueFile:
        return open_file(path, own_mpp, mpp, cache, slides)

    try:
        for source in sources:
            own = _usable(source, _paths(source, root), files, open_)
            _warn_of_groups(source, [f.path for f in own])
            rng = np.random.default_rng((seed, 7))
            _divide(own, source, sides, groups_held, validation_share, rng)
            training.append([f for f in own if not sides[f.path]])
            held.append([f for f in own if sides[f.path]])
            if not training[-1]:
                raise DatasetError(
                    f"{root / source.path}: all its files are held out through another source; "
                    "merge the two or set validation_share to 0"
                )
    except WsisegError:
        slides.close()
        raise
    return Pools(_pool(sources, training), _pool(sources, held) if any(held) else None, slides)


def _usable(
    source: SourceConfig,
    paths: Sequence[Path],
    files: dict[tuple[Path, float | None], TissueFile | str],
    open_: Callable[[Path, float | None], TissueFile],
) -> list[TissueFile]:
    """The files of a source that can be used; those that cannot are warned of when they are met
    first. `files` gets all that are opened, or what is wrong with them.

    Raises:
        DatasetError: none can be used.
    """
    new = [path for path in paths if (path, source.mpp) not in files]
    for path in new:
        try:
            files[path, source.mpp] = open_(path, source.mpp)
        except (SlideError, DatasetError) as e:
            files[path, source.mpp] = _why(e)
    found = [files[path, source.mpp] for path in paths]
    usable = [f for f in found if not isinstance(f, str)]
    if not usable:
        raise DatasetError(
            f"source {source.path}: none of its {len(found)} files can be used; {found[0]}"
        )
    for path in new:
        if isinstance(why := files[path, source.mpp], str):
            warnings.warn(
                f"{why}; it is left out; exclude of source {source.path} silences this",
                stacklevel=2,
            )
    return usable


def _why(error: WsisegError) -> str:
    """What is wrong with a file, and what its source can do; no options of other commands."""
    first, *advice = str(error).split("; ")
    text = "; ".join([first, *(a for a in advice if "--" not in a)])
    if isinstance(error, ResolutionError):
        text += "; set mpp of its source (of a separate one where other slides differ)"
    return text


def _pool(sources: Sequence[SourceConfig], groups: Sequence[Sequence[TissueFile]]) -> TilePool:
    """The pool of the sources that have files."""
    pairs = [(s, g) for s, g in zip(sources, groups, strict=True) if g]
    return TilePool(
        [g for _, g in pairs], [s.weight for s, _ in pairs], [s.label for s, _ in pairs]
    )


def _warn_of_groups(source: SourceConfig, paths: Sequence[Path]) -> None:
    """Say of how many files of a source its expression tells no group."""
    lost = [p for p in paths if source.group and not re.search(source.group, p.name)]
    if lost:
        warnings.warn(
            f"source {source.path}: group {source.group!r} finds nothing in {len(lost)} of "
            f"{len(paths)} names, such as {lost[0].name}; each of them is held out by itself, and "
            "copies of it or images of its patient may be trained on",
            stacklevel=2,
        )


def _divide(
    files: Sequence[TissueFile],
    source: SourceConfig,
    sides: dict[Path, bool],
    groups_held: dict[str, bool],
    share: float,
    rng: np.random.Generator,
) -> None:
    """Say of each file that is not in `sides` yet whether it is held out, and of each group that
    an expression found and is not in `groups_held` yet."""
    keys = {f.path: source.group_of(f.path) for f in files}
    groups = sorted(set(keys.values()))
    settled = groups_held if source.group else {}
    left = [key for key in groups if key not in settled]
    count = min(int(np.ceil(share * len(groups))), len(groups) // 2)
    count -= sum(settled.get(key, False) for key in groups)
    chosen = {left[int(i)] for i in rng.permutation(len(left))[: max(0, count)]}
    settled |= {key: key in chosen for key in left}
    for path, key in keys.items():
        sides.setdefault(path, settled[key])


def _paths(source: SourceConfig, root: Path) -> list[Path]:
    try:
        paths = sorted(
            p
            for p in root.glob(source.path)
            if p.is_file() and not (source.exclude and p.match(source.exclude))
        )
    except (ValueError, NotImplementedError) as e:
        raise ConfigError(f"source path {source.path!r}: not a pattern of files ({e})") from e
    if not paths:
        raise DatasetError(f"{root / source.path}: no such images; check the data folder and path")
    return paths
