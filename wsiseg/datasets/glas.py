"""GlaS: glands in H&E-stained colon, MICCAI 2015 challenge, official names and parts.

Source: Sirinukunwattana et al., Gland segmentation in colon histology images: the GlaS challenge
contest (Medical Image Analysis 2017). 0.62005 um per pixel, 20x.
"""

from __future__ import annotations

import csv
import itertools
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from wsiseg.classes import Classes, TissueClass
from wsiseg.datasets.base import (
    Int32,
    LabelledDataset,
    LabelledImage,
    UInt8,
    load_image,
    rgb,
)
from wsiseg.errors import DatasetError, UsageError

MPP = 0.62005
PARTS = ("train", "testA", "testB")
CLASSES = Classes(
    (
        TissueClass("Other tissue", (205, 205, 215), background=True),
        TissueClass("Gland", (60, 160, 75)),
    )
)
GRADES = Classes(
    (
        TissueClass("Other tissue", (205, 205, 215), background=True),
        TissueClass("Benign gland", (60, 160, 75)),
        TissueClass("Malignant gland", (200, 60, 60)),
    )
)
LAYOUT = (
    "a folder with train_1.bmp (or .png), train_1_anno.bmp, ... testA_1.bmp, ... and Grade.csv, "
    "as in the archive of the GlaS challenge (warwick.ac.uk/fac/cross_fac/tia/data/glascontest)"
)


@dataclass(frozen=True)
class GlaSConfig:
    """Options of the data set."""

    classes: Literal["glands", "grades"] = "glands"
    """`glands`: gland against other tissue; `grades`: benign against malignant glands, by the
    grade of the image in Grade.csv."""


class GlaS(LabelledDataset):
    """One part of GlaS: 0 = other tissue, 1 = gland; with grades 1 = benign, 2 = malignant."""

    mpp = MPP
    terms = "Research only, no commercial use (the terms of GlaS)"

    def __init__(self, root: str | Path, part: str, config: GlaSConfig | None = None) -> None:
        """Find the images of a part.

        Args:
            root: folder with the official files.
            part: train, testA or testB.
            config: options; default those of GlaSConfig.

        Raises:
            UsageError: no such part.
            DatasetError: the folder does not hold the part in the official layout, or grades are
                asked for and Grade.csv lacks one.
        """
        config = config or GlaSConfig()
        if part not in PARTS:
            raise UsageError(f"GlaS has no part {part!r}; it has {', '.join(PARTS)}")
        self.root = Path(root)
        pattern = re.compile(rf"{part}_(\d+)\.(bmp|png)$")
        found = [(int(m[1]), p) for p in self._files() if (m := pattern.match(p.name))]
        if not found:
            raise DatasetError(f"{self.root}: no images of GlaS {part}; expected {LAYOUT}")
        self.paths = [path for _, path in sorted(found)]
        doubled = [p.stem for p, q in itertools.pairwise(self.paths) if p.stem == q.stem]
        if doubled:
            raise DatasetError(f"{self.root}: {doubled[0]} is there as bmp and as png; keep one")
        self.names = tuple(path.stem for path in self.paths)
        rows = read_grades(self.root)
        unlisted = [n for n in self.names if n not in rows]
        if unlisted:
            more = f" and {len(unlisted) - 1} others" if len(unlisted) > 1 else ""
            warnings.warn(
                f"{self.root / 'Grade.csv'}: has no row for {unlisted[0]}{more}; each counts as a "
                "patient of its own",
                stacklevel=2,
            )
        self.groups = tuple(rows[n].group if n in rows else n for n in self.names)
        self.measuring = part != "train"
        self.classes = GRADES if config.classes == "grades" else CLASSES
        self.values = (1,) * len(self.names)
        if config.classes == "grades":
            self.values = tuple(_grade_class(self.root, n, rows) for n in self.names)

    def __getitem__(self, index: int) -> LabelledImage:
        path = self.paths[index]
        image = rgb(_open(path))
        instances = self.instances(index)
        if instances.shape != image.shape[:2]:
            raise DatasetError(f"{path}: image and annotation differ in size")
        mask = self._labels(index, instances)
        return LabelledImage(path.stem, image, mask, self.groups[index], instances)

    def mask(self, index: int) -> UInt8:
        """(H, W) mask of an image."""
        return self._labels(index, self.instances(index))

    def _labels(self, index: int, instances: Int32) -> UInt8:
        return ((instances > 0) * np.uint8(self.values[index])).astype(np.uint8)

    def instances(self, index: int) -> Int32:
        """(H, W) int32 gland numbers, 0 = none."""
        path = self.paths[index]
        labels = np.asarray(_open(path.with_name(f"{path.stem}_anno{path.suffix}")))
        return (labels[..., 0] if labels.ndim == 3 else labels).astype(np.int32)

    def _files(self) -> list[Path]:
        if not self.root.is_dir():
            raise DatasetError(f"{self.root}: no such folder; GlaS is {LAYOUT}")
        return list(self.root.iterdir())


class GradeRow(NamedTuple):
    """A line of Grade.csv.

    Attributes:
        group: the patient.
        malignant: whether the tissue is, or None where the column is missing.
    """

    group: str
    malignant: bool | None


def read_grades(root: Path) -> dict[str, GradeRow]:
    """Patient and grade by image name from Grade.csv, whose names and values carry stray spaces.

    Without the file there are none.

    Raises:
        DatasetError: not such a table, or a row without a patient.
    """
    path = root / "Grade.csv"
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [
                {str(k).strip(): str(v).strip() for k, v in r.items()} for r in csv.DictReader(file)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DatasetError(f"{path}: not a readable table ({e})") from e
    if not rows or not {"name", "patient ID"} <= rows[0].keys():
        raise DatasetError(f"{path}: no table with the columns 'name' and 'patient ID'")
    for row in rows:
        if row["patient ID"] in ("", "None"):
            raise DatasetError(f"{path}: no patient ID for {row['name'][:60]!r}")
    return {row["name"]: GradeRow(f"patient {row['patient ID']}", _malignant(row)) for row in rows}


def _malignant(row: Mapping[str, str]) -> bool | None:
    """The grade of a row, from the column 'grade (GlaS)': benign or malignant."""
    text = next((v for k, v in row.items() if k.startswith("grade (GlaS")), "")
    return {"benign": False, "malignant": True}.get(text.lower())


def _grade_class(root: Path, name: str, rows: Mapping[str, GradeRow]) -> int:
    malignant = rows[name].malignant if name in rows else None
    if malignant is None:
        raise DatasetError(f"{root / 'Grade.csv'}: no grade (benign or malignant) for {name}")
    return 2 if malignant else 1


def _open(path: Path) -> Image.Image:
    if not path.exists():
        raise DatasetError(f"{path}: not there; GlaS is {LAYOUT}")
    return load_image(path)
