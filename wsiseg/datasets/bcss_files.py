"""The files of BCSS: their names, codes, pairing and pixels. Knows no patches and no training.

Source: Amgad et al., Structured crowdsourcing enables convolutional segmentation of histology
images (Bioinformatics 2019). Masks hold 22 codes, named in meta/gtruth_codes.tsv.
"""

from __future__ import annotations

import csv
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL.PngImagePlugin import PngImageFile

from wsiseg.classes import IGNORE
from wsiseg.errors import DatasetError
from wsiseg.geometry import Size
from wsiseg.slides.image_file import MAX_IMAGE_PX
from wsiseg.slides.resample import axis_taps, resample

UInt8 = npt.NDArray[np.uint8]
STRIP_PX = 1024

CODES = (
    "outside_roi",
    "tumor",
    "stroma",
    "lymphocytic_infiltrate",
    "necrosis_or_debris",
    "glandular_secretions",
    "blood",
    "exclude",
    "metaplasia_NOS",
    "fat",
    "plasma_cells",
    "other_immune_infiltrate",
    "mucoid_material",
    "normal_acinus_or_duct",
    "lymphatics",
    "undetermined",
    "nerve",
    "skin_adnexa",
    "blood_vessel",
    "angioinvasion",
    "dcis",
    "other",
)
"""Official names of the mask values 0..21."""

TUMOUR, STROMA, INFLAMMATORY, NECROSIS, OTHER = range(5)
_NAMED = {
    "outside_roi": IGNORE,
    "tumor": TUMOUR,
    "angioinvasion": TUMOUR,
    "dcis": TUMOUR,
    "stroma": STROMA,
    "lymphocytic_infiltrate": INFLAMMATORY,
    "plasma_cells": INFLAMMATORY,
    "other_immune_infiltrate": INFLAMMATORY,
    "necrosis_or_debris": NECROSIS,
}
GROUP_OF_CODE = tuple(_NAMED.get(name, OTHER) for name in CODES)
"""Network label of each code; 0, outside the annotated region, is ignored, never `other`."""

_LOOKUP = np.full(256, IGNORE, np.uint8)
_LOOKUP[: len(CODES)] = GROUP_OF_CODE

TEST_INSTITUTIONS = frozenset({"OL", "LL", "E2", "EW", "GM", "S3"})
IMAGE_FOLDERS = {"colour_normalised": "rgbs_colorNormalized", "original": "rgbs"}
LAYOUT = (
    "a folder with rgbs_colorNormalized/ or rgbs/, masks/ (PNG of the same names, such as "
    "TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500.png) and meta/gtruth_codes.tsv, as the BCSS "
    "page (github.com/PathologyDataScience/BCSS, formerly CrowdsourcingDataset-Amgadetal2019; "
    "Amgad et al. 2019) offers it for download"
)
_NAME = re.compile(r"(TCGA-(\w{2})-\w{4})-[^_]+_.*MPP-(\d+(?:\.\d+)?)\.png", re.ASCII)


@dataclass(frozen=True)
class Roi:
    """An annotated region: an RGB file and a mask file of one name.

    Attributes:
        name: file name without suffix.
        patient: TCGA-xx-xxxx; each has one slide and one region.
        image: the RGB PNG.
        mask: the PNG of codes.
        size: in pixels of the files.
        scale: file pixels per pixel of the resolution that is read.
    """

    name: str
    patient: str
    image: Path
    mask: Path
    size: Size
    scale: float

    @property
    def scaled(self) -> Size:
        """Whole pixels at the resolution that is read, at least one each way."""
        width, height = (max(1, int(n / self.scale + 1e-6)) for n in self.size)
        return Size(width, height)


def find_rois(root: Path, part: str, *, images: str, mpp: float) -> list[Roi]:
    """The regions of a part, by name; only file headers are read.

    Args:
        root: folder with the official files.
        part: train or test: the institution decides, the second field of the name.
        images: a key of IMAGE_FOLDERS, or auto: colour-normalised images where they are there.
        mpp: resolution to read at.

    Raises:
        DatasetError: missing folders, files or partners, other names, sizes that differ.
    """
    folder = _image_folder(root, images)
    masks = root / "masks"
    names = _names(masks, part)
    pictures = _names(folder, part)
    for name in sorted(names.keys() ^ pictures.keys()):
        absent = (folder if name in names else masks) / name
        raise DatasetError(f"{absent}: not there, though its partner is; expected {LAYOUT}")
    if not names:
        raise DatasetError(f"{masks}: no regions of BCSS {part}; expected {LAYOUT}")
    return [_roi(folder / n, masks / n, m, mpp) for n, m in sorted(names.items())]


def check_codes(root: Path) -> None:
    """Make sure that gtruth_codes.tsv means the codes of CODES.

    Raises:
        DatasetError: the table is missing, unreadable or names a code differently.
    """
    path = root / "meta" / "gtruth_codes.tsv"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [(r["label"], int(r["GT_code"])) for r in csv.DictReader(file, delimiter="\t")]
    except FileNotFoundError as e:
        raise DatasetError(f"{path}: not there; BCSS is {LAYOUT}") from e
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DatasetError(f"{path}: not a readable table ({e})") from e
    except (KeyError, TypeError, ValueError) as e:
        raise DatasetError(
            f"{path}: each line must have a 'label' and a number 'GT_code' ({e})"
        ) from e
    named = {code: label for label, code in rows}
    for code in sorted(named.keys() | set(range(len(CODES)))):
        expected = CODES[code] if 0 <= code < len(CODES) else None
        if named.get(code) != expected:
            raise DatasetError(
                f"{path}: code {code} is {named.get(code) or 'not listed'}, expected "
                f"{expected or 'none of that number'}; the grouping into classes would be wrong"
            )


def read_image(roi: Roi) -> UInt8:
    """(H, W, 3) uint8 RGB of a region, averaged over the area of each pixel."""
    width, height = roi.scaled
    pixels = np.empty((height, width, 3), np.uint8)
    step = max(1, int(STRIP_PX / roi.scale))
    x = axis_taps(0, width, scale=roi.scale, offset=0, limit=roi.size.width)
    with _png(roi.image) as png:
        source = png if png.mode == "RGB" else png.convert("RGB")
        for top in range(0, height, step):
            count = min(step, height - top)
            y = axis_taps(top, count, scale=roi.scale, offset=0, limit=roi.size.height)
            strip = np.asarray(source.crop((x.start, y.start, x.stop, y.stop)))
            pixels[top : top + count] = resample(strip, x, y)
    return pixels


def read_mask(roi: Roi) -> UInt8:
    """(H, W) uint8 labels 0..4, 255 = ignore: the code at the centre of each pixel.

    The nearest code is taken, not the most frequent: halving leaves four codes a pixel, where
    ties are common and any rule for them would shift borders one way.

    Raises:
        DatasetError: damaged file, not one channel, a code that BCSS does not have.
    """
    with _png(roi.mask) as png:
        if png.mode not in ("L", "P"):
            raise DatasetError(f"{roi.mask}: must be one 8-bit channel of codes, not {png.mode}")
        highest = [code for code, count in enumerate(png.histogram()) if count][-1]
        if highest >= len(CODES):
            raise DatasetError(
                f"{roi.mask}: holds the code {highest}; BCSS has 0 to {len(CODES) - 1}"
            )
        codes: UInt8 = np.asarray(png)
    columns, rows = (
        np.minimum(((np.arange(n) + 0.5) * roi.scale).astype(np.int64), limit - 1)
        for n, limit in zip(roi.scaled, roi.size, strict=True)
    )
    labels: UInt8 = _LOOKUP[codes[rows][:, columns]]
    return labels


def _image_folder(root: Path, images: str) -> Path:
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; BCSS is {LAYOUT}")
    keys = list(IMAGE_FOLDERS) if images == "auto" else [images]
    for key in keys:
        if (root / IMAGE_FOLDERS[key]).is_dir():
            return root / IMAGE_FOLDERS[key]
    wanted = " or ".join(f"{IMAGE_FOLDERS[k]}/" for k in keys)
    raise DatasetError(f"{root}: no {wanted} in it; expected {LAYOUT}")


def _names(folder: Path, part: str) -> dict[str, re.Match[str]]:
    """The regions' files of a part in a folder."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; BCSS is {LAYOUT}")
    found = {}
    for path in folder.glob("[!.]*.png"):
        match = _NAME.fullmatch(path.name)
        if match is None or float(match[3]) <= 0:
            raise DatasetError(f"{path}: not a name of BCSS with institution and MPP; {LAYOUT}")
        if (match[2] in TEST_INSTITUTIONS) == (part == "test"):
            found[path.name] = match
    return found


def _roi(image: Path, mask: Path, match: re.Match[str], mpp: float) -> Roi:
    sizes = []
    for path in (image, mask):
        with _opened(path) as png:
            sizes.append(Size(*png.size))
    if sizes[0] != sizes[1]:
        (w, h), (u, v) = sizes
        raise DatasetError(f"{mask}: is {u} x {v} px, but {image} is {w} x {h}; give the pair")
    return Roi(mask.stem, match[1], image, mask, sizes[1], mpp / float(match[3]))


@contextmanager
def _png(path: Path) -> Iterator[PngImageFile]:
    """An open PNG with its pixels decoded."""
    with _opened(path) as png:
        try:
            png.load()
        except (OSError, SyntaxError, ValueError, EOFError, struct.error) as e:
            raise DatasetError(f"{path}: damaged PNG ({e}); download it again") from e
        yield png


@contextmanager
def _opened(path: Path) -> Iterator[PngImageFile]:
    """An open PNG, past the limit on pixels that Image.open has: regions may be larger."""
    try:
        png = PngImageFile(path)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as e:
        raise DatasetError(f"{path}: not a readable PNG ({e}); download it again") from e
    with png:
        width, height = png.size
        if width * height > MAX_IMAGE_PX:
            raise DatasetError(f"{path}: {width} x {height} px, which no region of BCSS has")
        yield png
