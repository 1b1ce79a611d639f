"""GlaS: glands in H&E-stained colon, MICCAI 2015 challenge, official names and parts.

Source: Sirinukunwattana et al., Gland segmentation in colon histology images: the GlaS challenge
contest (Medical Image Analysis 2017). 0.62005 um per pixel, 20x.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from wsiseg.classes import Classes, TissueClass
from wsiseg.datasets.base import LabelledImage
from wsiseg.errors import DatasetError, UsageError

MPP = 0.62005
PARTS = ("train", "testA", "testB")
CLASSES = Classes(
    (
        TissueClass("Other tissue", (205, 205, 215), background=True),
        TissueClass("Gland", (60, 160, 75)),
    )
)
LAYOUT = (
    "a folder with train_1.bmp (or .png), train_1_anno.bmp, ... testA_1.bmp, ... and Grade.csv, "
    "as in the archive of the GlaS challenge (University of Warwick, TIA centre)"
)


class GlaS:
    """One part of GlaS: 0 = other tissue, 1 = gland."""

    classes = CLASSES
    mpp = MPP

    def __init__(self, root: str | Path, part: str) -> None:
        """Find the images of a part.

        Args:
            root: folder with the official files.
            part: train, testA or testB.

        Raises:
            UsageError: no such part.
            DatasetError: the folder does not hold the part in the official layout.
        """
        if part not in PARTS:
            raise UsageError(f"GlaS has no part {part!r}; it has {', '.join(PARTS)}")
        self.root = Path(root)
        pattern = re.compile(rf"{part}_(\d+)\.(bmp|png)$")
        found = [(int(m[1]), p) for p in self._files() if (m := pattern.match(p.name))]
        if not found:
            raise DatasetError(f"{self.root}: no images of GlaS {part}; expected {LAYOUT}")
        self.paths = [path for _, path in sorted(found)]
        self.names = tuple(path.stem for path in self.paths)
        patients = read_patients(self.root)
        self.groups = tuple(patients.get(name, name) for name in self.names)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> LabelledImage:
        path = self.paths[index]
        image = np.asarray(_open(path).convert("RGB"))
        instances = self.instances(index)
        if instances.shape != image.shape[:2]:
            raise DatasetError(f"{path}: image and annotation differ in size")
        return LabelledImage(path.stem, image, (instances > 0).astype(np.uint8), self.groups[index])

    def instances(self, index: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        """(H, W) int32 gland numbers, 0 = none."""
        path = self.paths[index]
        labels = np.asarray(_open(path.with_name(f"{path.stem}_anno{path.suffix}")))
        return (labels[..., 0] if labels.ndim == 3 else labels).astype(np.int32)

    def _files(self) -> list[Path]:
        if not self.root.is_dir():
            raise DatasetError(f"{self.root}: no such folder; GlaS is {LAYOUT}")
        return list(self.root.iterdir())


def read_patients(root: Path) -> dict[str, str]:
    """Patient by image name from Grade.csv, whose names and values carry stray spaces."""
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
    try:
        return {row["name"]: f"patient {row['patient ID']}" for row in rows}
    except KeyError as e:
        raise DatasetError(f"{path}: no column {e}; expected 'name' and 'patient ID'") from e


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return image
    except FileNotFoundError as e:
        raise DatasetError(f"{path}: not there; GlaS is {LAYOUT}") from e
    except (OSError, UnidentifiedImageError) as e:
        raise DatasetError(f"{path}: not a readable image ({e})") from e
