"""Where the tissue of a slide lies, from a small picture of it. Knows no models and no classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from wsiseg.errors import SlideError
from wsiseg.geometry import Box, Grid, Size
from wsiseg.slides.image_file import ImageFileError, open_image
from wsiseg.slides.ink import OBJECT_UM2, find_ink, without_small
from wsiseg.slides.slide import Slide

Bool = npt.NDArray[np.bool_]
Float = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

_DETECTION_MPP = 8.0
_DETECTION_MAX_PX = 4096
_MAX_SOURCE_PX = 20_000_000_000  # a quarter of an hour of decoding
_SATURATION = (0.05, 0.10)
_DENSITY_MIN = 0.03
_DENSITY_DARK = 0.22
_CLOSE_UM = 16.0
_MARGIN_UM = 12.0
_SPECK_UM2 = 1_000.0
_HOLE_UM2 = 50_000.0
_DARK = 64
"""No picture in bright light is darker than that all over."""


@dataclass(frozen=True)
class TissueMask:
    """Which part of a slide is tissue.

    Attributes:
        mask: (h, w) bool over the whole frame of the slide.
        slide_um2: area of the frame in square micrometres.
    """

    mask: Bool
    slide_um2: float

    @property
    def grid_size(self) -> Size:
        """Size of the mask in its own pixels."""
        return Size(self.mask.shape[1], self.mask.shape[0])

    @property
    def fraction(self) -> float:
        """Share of the frame that is tissue, 0 .. 1."""
        return float(self.mask.mean())

    @property
    def area_mm2(self) -> float:
        """Area of tissue in square millimetres."""
        return self.fraction * self.slide_um2 / 1e6

    def covers(self, box: Box, grid: Grid) -> bool:
        """Whether any mask pixel that the box touches is tissue; False outside the grid."""
        inside = box.intersection(grid.box)
        if inside.is_empty():
            return False
        (gw, gh), (mw, mh) = grid.size, self.grid_size
        rows = slice(inside.y * mh // gh, -(-inside.bottom * mh // gh))
        columns = slice(inside.x * mw // gw, -(-inside.right * mw // gw))
        return bool(self.mask[rows, columns].any())

    def region(self, box: Box, grid: Grid) -> Bool:
        """(h, w) bool: the mask at the pixels of a box, by the mask pixel at each centre.

        Does not depend on how a region is split into boxes; False outside the grid.
        """
        result = np.zeros((max(0, box.height), max(0, box.width)), bool)
        inside = box.intersection(grid.box)
        if inside.is_empty():
            return result
        (gw, gh), (mw, mh) = grid.size, self.grid_size
        rows = (2 * np.arange(inside.y, inside.bottom) + 1) * mh // (2 * gh)
        columns = (2 * np.arange(inside.x, inside.right) + 1) * mw // (2 * gw)
        place = Box(inside.x - box.x, inside.y - box.y, inside.width, inside.height)
        result[place.slices] = self.mask[np.ix_(rows, columns)]
        return result


def find_tissue(slide: Slide, mode: str | Path = "auto") -> TissueMask:
    """The tissue of a slide.

    Args:
        slide: an open slide.
        mode: "auto" detects it (see `detect`); "none" takes everything as tissue; anything else is
            an image file of the whole frame in which every pixel that is not black is tissue; of
            label images whose palette has no black, every pixel that is not 0.

    Returns:
        A mask; with "auto" it is all False where there is no tissue.

    Raises:
        SlideError: the mask file is missing, no image, of another shape than the slide, or black;
            the slide is huge and has no reduced levels, or is dark all over.
        SlideReadError: the slide cannot be read.
    """
    mpp = max(slide.mpp, _DETECTION_MPP, max(slide.size) * slide.mpp / _DETECTION_MAX_PX)
    grid = slide.grid(mpp)
    um2 = slide.size.width * slide.size.height * slide.mpp**2
    if mode == "none":
        return TissueMask(np.ones((grid.size.height, grid.size.width), bool), um2)
    if mode == "auto":
        _check_cost(slide, grid)
        rgb = slide.read(grid.box, grid)
        _check_light(slide, rgb)
        return TissueMask(detect(rgb, mpp=grid.mpp), um2)
    return TissueMask(_from_file(Path(mode), slide.size), um2)


def _check_cost(slide: Slide, grid: Grid) -> None:
    """Refuse to read a huge level 0 for want of smaller levels: it would take hours."""
    size = slide.level_sizes[slide.best_level(grid)]
    if size.width * size.height > _MAX_SOURCE_PX:
        raise SlideError(
            f"{slide.path}: {size.width} x {size.height} px without reduced levels; convert it to "
            "a pyramidal TIFF"
        )


def _check_light(slide: Slide, rgb: UInt8) -> None:
    """Refuse fluorescence, and samples of 10 or 12 bits that were stored as 16."""
    brightest = float(np.quantile(rgb.max(-1), 0.995)) if rgb.size else 255.0
    if brightest < _DARK:
        raise SlideError(
            f"{slide.path}: is dark all over (at most {brightest:.0f} of 255), no slide in "
            "brightfield; where it holds samples of 10 or 12 bits, convert it to 8-bit RGB; "
            "--tissue none takes it as it is"
        )


def detect(rgb: UInt8, *, mpp: float) -> Bool:
    """The tissue of a picture: stained, not glass, not ink and not a black border.

    Pixels are balanced by the colour of the glass. Tissue is more saturated than a threshold,
    Otsu's kept within absolute limits so that a picture of tissue alone or of glass alone comes
    out right, or dark and somewhat saturated. Ink (pure green, blue, red, black; with its faint
    rims) is taken out. Gaps are closed, specks below 0.01 mm2 dropped, holes below 0.05 mm2 filled
    and a margin of 12 um added.

    Args:
        rgb: (h, w, 3) uint8.
        mpp: micrometres per pixel, about 8.

    Returns:
        (h, w) bool.
    """
    ink = find_ink(rgb, mpp)
    light = rgb.astype(np.float32) / _glass(rgb)
    light = np.clip(ndimage.gaussian_filter(light, (0.7, 0.7, 0)), 1 / 255, 1)
    high, low = light.max(-1), light.min(-1)
    saturation = (high - low) / high
    density = -np.log(light).mean(-1)
    usable = saturation[~ink]
    limit = float(np.clip(_otsu(usable), *_SATURATION)) if usable.size else _SATURATION[0]
    tissue = (saturation > limit) & (density > _DENSITY_MIN)
    tissue |= (density > _DENSITY_DARK) & (saturation > limit / 2)
    return _tidy(tissue & ~ink, ink, mpp)


def _tidy(tissue: Bool, ink: Bool, mpp: float) -> Bool:
    """Close gaps, drop specks, fill holes, add a margin; ink stays out."""
    area = tissue.size * mpp**2
    tissue = without_small(tissue, min(_SPECK_UM2, area / 100) / mpp**2)
    tissue = ~_widened(~_widened(tissue, _CLOSE_UM / mpp), _CLOSE_UM / mpp)
    tissue = without_small(tissue, min(OBJECT_UM2, area / 20) / mpp**2)
    tissue = _filled(tissue, min(_HOLE_UM2, area / 4) / mpp**2)
    return _widened(tissue, _MARGIN_UM / mpp) & ~ink


def _widened(mask: Bool, radius_px: float) -> Bool:
    """The mask and everything within a radius of it."""
    if not mask.any():
        return mask
    return np.asarray(ndimage.distance_transform_edt(~mask) <= max(1.0, radius_px))


def _filled(mask: Bool, least_px: float) -> Bool:
    """The mask with its holes below a number of pixels filled.

    At the frame of the picture, where a hole may be the corner of the glass, a quarter of that.
    """
    parts, _ = ndimage.label(~mask)
    sizes = np.bincount(parts.ravel())
    limit = np.full(len(sizes), least_px)
    limit[np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])] /= 4
    keep = sizes >= limit
    keep[0] = False
    return np.asarray(~keep[parts])


def _glass(rgb: UInt8) -> Float:
    """(3,) float32: the colour of empty glass, about white where none is seen."""
    high, low = rgb.max(-1).astype(np.int16), rgb.min(-1).astype(np.int16)
    bright = rgb[(low > 205) & (high - low < 18)]
    if len(bright) < 0.02 * high.size:
        return np.full(3, 245, np.float32)
    return np.asarray(np.maximum(np.median(bright, axis=0), 215), np.float32)


def _otsu(values: npt.NDArray[np.floating]) -> float:
    """The threshold in 0 .. 1 that best parts the values in two (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=256, range=(0, 1))
    centre = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts).astype(np.float64)
    above = below[-1] - below
    total = np.cumsum(counts * centre)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = total / below - (total[-1] - total) / above
        spread = np.nan_to_num(below * above * gap**2)
    return float(edges[int(spread.argmax()) + 1])


def _marked(image: Image.Image) -> Bool:
    """(h, w) bool: what is not black; of a palette image without black, what is not entry 0, as in
    the masks of `wsiseg predict` and other label images."""
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;"):
        return np.asarray(np.asarray(image) != 0, np.bool_)
    marked: Bool = np.asarray(np.asarray(image.convert("RGB")).any(axis=-1), np.bool_)
    if image.mode == "P" and marked.all():
        marked = np.asarray(np.asarray(image) > 0, np.bool_)
    if image.mode in ("RGBA", "LA", "PA"):
        marked &= np.asarray(image.getchannel("A")) > 0
    return marked


def _from_file(path: Path, slide_size: Size) -> Bool:
    """(h, w) bool from a mask file; see `find_tissue`."""
    try:
        with open_image(path) as image:
            grey = _marked(image)
    except FileNotFoundError as e:
        raise SlideError(f"{path}: no such tissue mask; check --tissue") from e
    except ImageFileError as e:
        raise SlideError(f"{path}: not a readable tissue mask ({e}); give a PNG") from e
    ratio = (grey.shape[1] / grey.shape[0]) / (slide_size.width / slide_size.height)
    if abs(math.log(ratio)) > math.log(1.02):
        raise SlideError(
            f"{path}: the tissue mask ({grey.shape[1]} x {grey.shape[0]}) has another shape than "
            f"the slide ({slide_size.width} x {slide_size.height}); it must show the whole slide"
        )
    if not grey.any():
        raise SlideError(
            f"{path}: the tissue mask is black everywhere; paint the tissue white, or use "
            "--tissue auto"
        )
    return grey
