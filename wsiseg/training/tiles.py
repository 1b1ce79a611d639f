"""Unlabelled tissue for pretraining: folders of images and slides, sampled as crops.

Knows no networks. Images are held out by group, so that what is measured on them was not trained
on.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wsiseg.errors import DatasetError, WsisegError
from wsiseg.training.tile_files import TissueFile
from wsiseg.training.tile_pool import UNREADABLE, TilePool, warn_of_small
from wsiseg.training.tile_slides import OpenSlides
from wsiseg.training.tile_sources import Found, SourceConfig, find_files

__all__ = [
    "Pools",
    "SourceConfig",
    "TilePool",
    "divide",
    "find_files",
    "load_pools",
    "other_files",
    "warn_of_small",
]


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
    """The files of all sources, found and divided; see `find_files` and `divide`.

    Raises:
        DatasetError: as of the two.
    """
    found = find_files(sources, root, mpp=mpp, memory_gb=memory_gb)
    return divide(found, validation_share=validation_share, seed=seed)


def divide(found: Found, *, validation_share: float = 0.0, seed: int = 0) -> Pools:
    """Divide the files of all sources into what is trained on and what is held out.

    Of each source the groups that hold out `validation_share` of them, rounded up, are drawn by
    the seed, but never more than half; one with a single group is trained on. A file that several
    sources name, and a group that their expressions find, is on one side for all of them: sources
    with an expression are divided first. Files in which it finds nothing are warned of.

    Of either side of a source images are decoded until one can be; those that cannot are warned of
    and left out. Further ones are only met when they are drawn.

    Args:
        found: the files; its slides are closed if they cannot be divided.
        validation_share: share of the groups to hold out; 0 = none.
        seed: seed of the division.

    Raises:
        DatasetError: all files of a source are held out through another one, or none of a side
            can be decoded.
    """
    sides: dict[Path, bool] = {}
    groups_held: dict[str, bool] = {}
    damaged: set[Path] = set()
    training: list[list[TissueFile]] = []
    held: list[list[TissueFile]] = []
    try:
        pairs = list(zip(found.sources, found.files, strict=True))
        for source, files in sorted(pairs, key=lambda pair: not pair[0].group):
            _warn_of_groups(source, [f.path for f in files])
            rng = np.random.default_rng((seed, 7))
            _divide(files, source, sides, groups_held, validation_share, rng)
        for source, files in pairs:
            training.append([f for f in files if not sides[f.path]])
            held.append([f for f in files if sides[f.path]])
            if not training[-1]:
                raise DatasetError(
                    f"source {source.path}: all its files are held out through another source; "
                    "merge the two or set validation_share to 0"
                )
            _look(source, training[-1], "training", damaged)
            _look(source, held[-1], "held-out", damaged)
    except WsisegError:
        found.slides.close()
        raise
    sound = [[[f for f in g if f.path not in damaged] for g in side] for side in (training, held)]
    held_out = _pool(found.sources, sound[1]) if any(sound[1]) else None
    return Pools(_pool(found.sources, sound[0]), held_out, found.slides)


def _look(source: SourceConfig, files: Sequence[TissueFile], side: str, damaged: set[Path]) -> None:
    """Read files of one side of a source until one can be read; others go into `damaged`.

    Raises:
        DatasetError: there are files, but none can be read.
    """
    wrong: dict[Path, WsisegError] = {}
    for file in files:
        if file.path in damaged:
            continue
        try:
            file.check()
            break
        except UNREADABLE as e:
            wrong[file.path] = e
    else:
        if files:
            first = next(iter(wrong.values()), files[0].path)
            raise DatasetError(
                f"source {source.path}: none of its {len(files)} {side} files can be read; "
                f"{first}; leave it out with exclude"
            )
    for error in wrong.values():
        text = f"{error}; it is left out; exclude of source {source.path} silences this"
        warnings.warn(text, stacklevel=3)
    damaged.update(wrong)


def _pool(sources: Sequence[SourceConfig], groups: Sequence[Sequence[TissueFile]]) -> TilePool:
    """The pool of the sources that have files."""
    pairs = [(s, g) for s, g in zip(sources, groups, strict=True) if g]
    return TilePool(
        [g for _, g in pairs],
        [s.weight for s, _ in pairs],
        [s.label for s, _ in pairs],
        [s.path for s, _ in pairs],
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
