"""Writes a BCSS data set in the official layout, with RGB painted from masks of codes.

    python tests/datasets/bcss_phantom.py FOLDER_WITH_REAL_MASKS OUT [--crop 3000]

The RGB is a patchwork of H&E-like textures, one for each class, cut along the masks: enough to
run and learn on real geometry, but no picture of the tissue that the masks were drawn on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from wsiseg.datasets.bcss_files import CODES, GROUP_OF_CODE
from wsiseg.slides.phantom_brush import GLAND, GLASS, STROMA, Style, paint

UInt8 = npt.NDArray[np.uint8]
MPP = 0.25


def textures(rng: np.random.Generator, tile_px: int = 768) -> dict[int, UInt8]:
    """A periodic (tile, tile, 3) texture for each network label; 255 looks like stroma."""
    shape = (tile_px, tile_px)

    def noise(sigma_um: float) -> npt.NDArray[np.float64]:
        white = rng.standard_normal(shape)
        smooth = ndimage.gaussian_filter(white, sigma_um / MPP, mode="wrap")
        return np.asarray(smooth / smooth.std())

    def brush(labels: npt.NDArray[np.integer]) -> UInt8:
        style = Style(goblet=0.0, epithelium_um=80)
        return paint(labels.astype(np.uint8), mpp=MPP, rng=rng, style=style, wrap=True)

    stroma = brush(np.full(shape, STROMA))
    tumour = brush(np.where(noise(10) > -0.9, GLAND, STROMA))
    fat = brush(np.where(np.abs(noise(12)) < 0.2, STROMA, GLASS))
    cells, debris = _lymphocytes(tile_px, rng)[..., None], noise(0.7)[..., None]
    inflamed = np.where(cells, (85, 60, 140) + 8 * noise(0.5)[..., None], stroma).astype(np.uint8)
    blurred = ndimage.gaussian_filter(stroma, (12, 12, 0), mode="wrap") * (0.97, 0.86, 0.93)
    necrosis = np.where(debris > 1.6, (120, 80, 150), blurred).astype(np.uint8)
    return {0: tumour, 1: stroma, 2: inflamed, 3: necrosis, 4: fat, 255: stroma}


def _lymphocytes(tile_px: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Periodic round nuclei of 5 um, about 7 um apart."""
    count, edge = round(tile_px * MPP / 7), 32
    grid = (np.mgrid[:count, :count] + rng.uniform(0.15, 0.85, (2, count, count))) / count
    far = np.ones((tile_px, tile_px), bool)
    far[tuple((grid * tile_px).astype(int).reshape(2, -1))] = False
    distance = ndimage.distance_transform_edt(np.pad(far, edge, mode="wrap"))
    return np.asarray(distance[edge:-edge, edge:-edge] < 2.5 / MPP)


def picture(codes: UInt8, tiles: Mapping[int, UInt8], rng: np.random.Generator) -> UInt8:
    """(H, W, 3) RGB for a mask, with textures shifted at random and a stain of its own."""
    groups = np.full(256, 255, np.uint8)
    groups[: len(CODES)] = GROUP_OF_CODE
    labels = groups[codes]
    gain = rng.uniform(0.85, 1.15, 3)
    result = np.empty((*codes.shape, 3), np.uint8)
    for group, tile in tiles.items():
        light = 255 * (tile / 255.0) ** gain
        shifted = np.roll(light, tuple(rng.integers(0, len(tile), 2)), (0, 1)).astype(np.uint8)
        repeats = [-(-n // len(tile)) for n in codes.shape]
        sheet = np.tile(shifted, (*repeats, 1))[: codes.shape[0], : codes.shape[1]]
        where = labels == group
        result[where] = sheet[where]
    return result


def synthetic_codes(
    size: tuple[int, int], rng: np.random.Generator, codes: tuple[int, ...] = (1, 2, 3, 4, 9)
) -> UInt8:
    """(H, W) codes in smooth regions, with a strip of 0 (outside) along the left edge."""
    fields = [ndimage.gaussian_filter(rng.standard_normal(size), 0.08 * min(size)) for _ in codes]
    result = np.asarray(codes, np.uint8)[np.argmax(fields, axis=0)]
    result[:, : size[1] // 20] = 0
    return result


def real_codes(folder: Path, crop_px: int | None = None) -> dict[str, UInt8]:
    """Masks by file name from `folder`/masks; `crop_px`: the middle, at most that large."""
    found = {}
    for path in sorted((folder / "masks").glob("*.png")):
        with Image.open(path) as image:
            codes = np.asarray(image)
        if crop_px:
            top, left = (max(0, (n - crop_px) // 2) for n in codes.shape)
            codes = codes[top : top + crop_px, left : left + crop_px]
        found[path.name] = np.ascontiguousarray(codes)
    return found


def write_bcss(
    root: Path,
    masks: Mapping[str, UInt8],
    *,
    seed: int = 0,
    folder: str = "rgbs_colorNormalized",
    tile_px: int = 768,
) -> Path:
    """The official layout: images in `folder`, masks/ and meta/gtruth_codes.tsv."""
    rng = np.random.default_rng(seed)
    tiles = textures(rng, tile_px)
    for name in (folder, "masks", "meta"):
        (root / name).mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{name}\t{code}\n" for code, name in enumerate(CODES))
    (root / "meta" / "gtruth_codes.tsv").write_text("label\tGT_code\n" + rows)
    for name, codes in masks.items():
        Image.fromarray(codes).save(root / "masks" / name)
        image = Image.fromarray(picture(codes, tiles, rng))
        image.save(root / folder / name, compress_level=1)
    return root


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with masks/ of BCSS")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--crop", type=int, help="largest side in pixels (default: whole masks)")
    options = parser.parse_args()
    masks = real_codes(options.source, options.crop)
    if not masks:
        parser.error(f"no PNG in {options.source / 'masks'}")
    write_bcss(options.out, masks, tile_px=min(768, options.crop or 768))
    print(f"{len(masks)} regions in {options.out}")


if __name__ == "__main__":
    main()
