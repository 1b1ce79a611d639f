"""A slide: its extent, its resolution, and its pixels at any resolution. Knows no tissue.

The frame is the part of level 0 that counts as the slide: the whole level 0, or, as QuPath shows
it, the box of `openslide.bounds-*` where the file states one. All boxes are relative to the frame.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from wsiseg.errors import ResolutionError, SlideError, SlideReadError, UsageError
from wsiseg.geometry import Box, Grid, Size
from wsiseg.slides.backend_base import Backend
from wsiseg.slides.backends import file_digest, open_backend
from wsiseg.slides.limits import is_too_large
from wsiseg.slides.resample import axis_taps, resample
from wsiseg.slides.resolution import Resolution, objective_power, resolve

UInt8 = npt.NDArray[np.uint8]
BACKENDS = ("auto", "openslide", "direct", "tiffslide")
_SOURCE_PX = 4096
_LEVEL_TOLERANCE = 1.01


def open_slide(
    path: str | Path,
    *,
    backend: str = "auto",
    mpp: float | None = None,
    crop_to_bounds: bool = True,
) -> Slide:
    """Open a slide or a plain image.

    Args:
        path: the file, or a folder with one DICOM slide.
        backend: "openslide", "direct" or "tiffslide" uses that one and no other; "auto" takes the
            first of OpenSlide, tiffslide and a plain image that reads the file, and direct in
            place of OpenSlide where that gives the same pixels.
        mpp: micrometres per level-0 pixel, over what the file states; 0.01 .. 1000.
        crop_to_bounds: whether the frame is cropped to the slide's bounds, as QuPath does.

    Raises:
        SlideError: the file is missing, damaged or of no known format.
        ResolutionError: its micrometres per pixel are unknown, absurd or not the same in x and y.
        UsageError: there is no such backend.
    """
    if backend not in BACKENDS:
        raise UsageError(f"no backend {backend}; choose one of {', '.join(BACKENDS)}")
    path = Path(path)
    source = open_backend(path, backend)
    try:
        resolution = resolve(str(path), source.properties, vendor=source.vendor, option=mpp)
        return Slide(path, source, resolution=resolution, crop_to_bounds=crop_to_bounds)
    except SlideError:
        source.close()
        raise


COARSE = 1.5
"""A slide whose mpp is over this many times the one wanted lacks what is looked for."""


class Slide:
    """An open slide; any number of threads may read it. Made by `open_slide`.

    Attributes:
        path: the file.
        backend: "openslide", "direct", "tiffslide" or "image".
        vendor: format family, as OpenSlide calls it.
        size: size of the frame in level-0 pixels.
        mpp: micrometres per level-0 pixel.
        mpp_source: "option", "properties", "tiff resolution" or "objective power".
        warnings: what a user should know, a line each.
        bounds: the box of `openslide.bounds-*` in level 0; None where not all four are stated.
        frame: "qupath" (cropped to bounds where there are any) or "openslide" (whole level 0).
        level_sizes: extent of the frame at each level of the file.
        level_downsamples: level-0 pixels per pixel of each level.
        properties: everything the file says of itself, as text.
        associated: sizes of label, macro and thumbnail images, by name.
        quickhash: `openslide.quickhash-1` where there is one, else what `file_digest`
            gives.
        objective_power: magnification of the objective, None where unknown.
    """

    def __init__(
        self, path: Path, source: Backend, *, resolution: Resolution, crop_to_bounds: bool
    ) -> None:
        self._source = source
        self.path = path
        self.backend = source.name
        self.vendor = source.vendor
        self.properties = source.properties
        self.associated = source.associated
        self.mpp = resolution.mpp
        self.mpp_source = resolution.source
        self.warnings = resolution.warnings
        self.objective_power = objective_power(source.properties)
        self.quickhash = source.properties.get("openslide.quickhash-1") or file_digest(path)
        self.frame = "qupath" if crop_to_bounds else "openslide"
        self._level0 = source.level_sizes[0]
        self.bounds = _bounds(source.properties, self._level0)
        whole = Box(0, 0, *self._level0)
        self._box = self.bounds if crop_to_bounds and self.bounds else whole
        self.size = Size(self._box.width, self._box.height)
        self.level_downsamples = source.level_downsamples
        self.level_sizes = tuple(self._level_size(size) for size in source.level_sizes)

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; the slide cannot be read any more."""
        self._source.close()

    def grid(self, mpp: float) -> Grid:
        """The pixels of the frame at `mpp` micrometres per pixel.

        Raises:
            ResolutionError: the slide is so coarse that it would be enlarged beyond all slides.
        """
        grid = Grid.at_mpp(self.size, self.mpp, mpp)
        if is_too_large(grid.size):
            raise ResolutionError(
                f"{self.path}: {self.mpp:g} um per pixel is too coarse to be read at {mpp:g}: that "
                f"makes {grid.size.width} x {grid.size.height} px; give the right one with --mpp"
            )
        return grid

    def best_level(self, grid: Grid) -> int:
        """The coarsest level that is at least as fine as the grid (to 1%)."""
        return self._best_level(min(grid.downsample))

    def read(self, box: Box, grid: Grid) -> UInt8:
        """The pixels of a box at the resolution of a grid.

        Each pixel is the mean of the area it covers in the best level (or interpolated, where the
        grid is finer than level 0). Its value does not depend on the box it is read with.
        Memory bound: 4096 x 4096 source pixels beside the result.

        Args:
            box: in pixels of the grid; may lie partly or wholly outside.
            grid: made by `grid()` of this slide.

        Returns:
            (box.height, box.width, 3) uint8 RGB, white outside the frame.

        Raises:
            SlideReadError: the slide is damaged there; names the slide and the place.
        """
        if grid.level0 != self.size:
            raise UsageError(f"{self.path}: the grid is of another slide ({grid.level0})")
        level = self.best_level(grid)
        step_x, step_y = (
            max(1, int(_SOURCE_PX * self.level_downsamples[level] / d)) for d in grid.downsample
        )
        inside = box.intersection(grid.box)
        if inside == box and 0 < box.width <= step_x and 0 < box.height <= step_y:
            return self._read_part(box, grid, level)
        result = np.full((max(0, box.height), max(0, box.width), 3), 255, np.uint8)
        if inside.is_empty():
            return result
        for y in range(inside.y, inside.bottom, step_y):
            for x in range(inside.x, inside.right, step_x):
                part = Box(x, y, step_x, step_y).intersection(inside)
                place = Box(part.x - box.x, part.y - box.y, part.width, part.height)
                result[place.slices] = self._read_part(part, grid, level)
        return result

    def thumbnail(self, max_px: int) -> UInt8:
        """(h, w, 3) uint8 RGB of the whole frame, longer side at most `max_px` (and level 0)."""
        grid = self.thumbnail_grid(max_px)
        return self.read(grid.box, grid)

    def thumbnail_grid(self, max_px: int) -> Grid:
        """The grid of the whole frame whose longer side is at most `max_px` pixels.

        Raises:
            UsageError: `max_px` is below 1.
        """
        if max_px < 1:
            raise UsageError(f"a thumbnail of {max_px} px cannot be; ask for 1 px or more")
        return self.grid(self.mpp * max(1.0, max(self.size) / max_px))

    def _read_part(self, box: Box, grid: Grid, level: int) -> UInt8:
        size = self._source.level_sizes[level]
        ratio_x, ratio_y = _level_ratio(self._level0, size)
        x = axis_taps(
            box.x,
            box.width,
            scale=grid.downsample[0] / ratio_x,
            offset=self._box.x / ratio_x,
            limit=size.width,
        )
        y = axis_taps(
            box.y,
            box.height,
            scale=grid.downsample[1] / ratio_y,
            offset=self._box.y / ratio_y,
            limit=size.height,
        )
        source = Box(x.start, y.start, x.stop - x.start, y.stop - y.start)
        pixels = self._source.read_level(level, source)
        if pixels.shape[:2] != (source.height, source.width):
            raise SlideReadError(f"{self.path}: level {level} ends before its stated size")
        return resample(pixels, x, y)

    def _best_level(self, downsample: float) -> int:
        fine = [
            i for i, d in enumerate(self.level_downsamples) if d <= downsample * _LEVEL_TOLERANCE
        ]
        return max(fine, key=lambda i: self.level_downsamples[i], default=0)

    def _level_size(self, size: Size) -> Size:
        """The extent of the frame at a level of the given size."""
        width = self.size.width * size.width / self._level0.width
        height = self.size.height * size.height / self._level0.height
        return Size(max(1, round(width)), max(1, round(height)))


def _level_ratio(level0: Size, size: Size) -> tuple[float, float]:
    """Level-0 pixels per pixel of a level along (x, y).

    A whole number where the level is level 0 over that number but for a cut or added last pixel,
    as scanners make levels; so the level lies on level 0 without a drift.
    """
    whole = max(1, round(level0.width / size.width))
    if all(abs(full / whole - part) < 1 for full, part in zip(level0, size, strict=True)):
        return float(whole), float(whole)
    return level0.width / size.width, level0.height / size.height


def _bounds(properties: dict[str, str], level0: Size) -> Box | None:
    """The bounds of a slide, clipped to its level 0; None unless all four are whole numbers."""
    try:
        x, y, width, height = (
            int(properties[f"openslide.bounds-{key}"]) for key in ("x", "y", "width", "height")
        )
    except (KeyError, ValueError):
        return None
    box = Box(x, y, width, height).intersection(Box(0, 0, *level0))
    return None if box.is_empty() else box
