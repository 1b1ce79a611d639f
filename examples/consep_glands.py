"""Weak labels of glands from labelled nuclei: CoNSeP as images that `background.annotated` takes.

    python examples/consep_glands.py DATA/consep DATA/consep-glands

CoNSeP's training part comes as tiles of 256 px, 16 of each image of 1000 px (0.25 um per pixel):
nine side by side, then three along the lower edge, three along the right one and the corner. They
are put together again, and masks are made of the types of nuclei, for
configs/datasets/consep-glands.yaml:

- an image without nuclei of epithelium is other tissue everywhere (1);
- where nuclei of epithelium lie close together, the area between them is gland (2), but not next to
  spindle-shaped nuclei; single cells and small groups are left unknown (0);
- around other nuclei, away from epithelium, it is other tissue (1);
- all else is unknown (0), lumina and the edges of glands among it.

Nobody drew glands here, and no borders can be learnt from these masks.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

UInt8 = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
SIDE, TILE, MPP = 1000, 256, 0.25
INFLAMMATORY, EPITHELIAL, SPINDLE = 2, 3, 4
UNKNOWN, OTHER, GLAND = 0, 1, 2
GAP_UM = 6.0
"""Nuclei of epithelium nearer than twice this belong together."""
AWAY_UM = 8.0
"""Other tissue is as far as this from every nucleus of epithelium."""
AROUND_UM = 3.0
"""How far a nucleus says what is around it."""
SMALLEST_UM2 = 800.0
"""Groups of epithelium below this are left unknown."""


def main() -> None:
    """Write all images and their masks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("consep", type=Path, help="folder with images/ and seg_mask/")
    parser.add_argument("out", type=Path, help="folder to write")
    words = parser.parse_args()
    numbers = {
        int(found[1])
        for path in (words.consep / "images").glob("train_*_000.jpg")
        if (found := re.match(r"train_(\d+)_", path.name))
    }
    if not numbers:
        parser.error(f"{words.consep}: has no images/train_*_000.jpg")
    try:
        for number in sorted(numbers):
            write(words.consep, number, words.out)
    except OSError as e:
        sys.exit(f"error: {e}")
    print(f"{len(numbers)} images in {words.out}")


def write(consep: Path, number: int, out: Path) -> None:
    """Write an image and its mask."""
    image = whole(consep / "images", f"train_{number}_{{:03d}}.jpg")
    nuclei = whole(consep / "seg_mask", f"train_{number}_{{:03d}}.png")
    for folder, pixels in (("img", image), ("mask", glands(nuclei))):
        (out / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(out / folder / f"train_{number}.png")


def whole(folder: Path, pattern: str) -> UInt8:
    """An image (1000, 1000[, 3]) of its 16 tiles."""
    starts = [(row * TILE, column * TILE) for row in range(3) for column in range(3)]
    last = SIDE - TILE
    starts += [(last, column * TILE) for column in range(3)]
    starts += [(row * TILE, last) for row in range(3)] + [(last, last)]
    tiles = [np.asarray(Image.open(folder / pattern.format(k))) for k in range(16)]
    image = np.zeros((SIDE, SIDE, *tiles[0].shape[2:]), np.uint8)
    for (y, x), tile in zip(starts, tiles, strict=True):
        image[y : y + TILE, x : x + TILE] = tile
    return image


def glands(nuclei: UInt8) -> UInt8:
    """Mask (H, W) of glands and other tissue from types of nuclei (H, W)."""
    epithelium = nuclei == EPITHELIAL
    if not epithelium.any():
        return np.full(nuclei.shape, OTHER, np.uint8)
    spindle, other = nuclei == SPINDLE, (nuclei == SPINDLE) | (nuclei == INFLAMMATORY)
    gland = ~within(~within(epithelium, GAP_UM), GAP_UM) & ~within(spindle, AROUND_UM)
    parts, count = ndimage.label(gland)
    areas = ndimage.sum_labels(gland, parts, range(count + 1)) * MPP**2
    mask = np.where((areas >= SMALLEST_UM2)[parts] & gland, GLAND, UNKNOWN).astype(np.uint8)
    mask[within(other, AROUND_UM) & ~within(epithelium, AWAY_UM)] = OTHER
    return mask


def within(pixels: Mask, distance_um: float) -> Mask:
    """Which pixels are so near to one of `pixels`, or one of them."""
    if not pixels.any():
        return pixels
    near: Mask = ndimage.distance_transform_edt(~pixels) * MPP <= distance_um
    return near


if __name__ == "__main__":
    main()
