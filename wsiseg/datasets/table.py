"""The table of data sets. Knows their names, not their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from wsiseg.datasets.base import LabelledDataset
from wsiseg.datasets.glas import GlaS
from wsiseg.errors import UsageError

DATASETS: dict[str, Callable[[Path, str], LabelledDataset]] = {"glas": GlaS}
"""Data set by name: called with its folder and the part wanted."""


def open_dataset(name: str, root: str | Path, part: str) -> LabelledDataset:
    """A part of a data set.

    Raises:
        UsageError: unknown data set or part.
        DatasetError: the folder does not hold it.
    """
    if name not in DATASETS:
        raise UsageError(f"no data set {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name](Path(root), part)
