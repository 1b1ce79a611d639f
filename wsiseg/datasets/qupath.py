"""Slides with annotations exported from QuPath as patches with masks. Knows no networks.

A folder holds slides, and beside them or in `annotations/` a GeoJSON file of the same name for
those that are annotated (SLIDE.svs, SLIDE.geojson or SLIDE.geojson.gz). Annotated areas become
labels at the resolution wanted; where nothing is annotated, 255. The frame is that of the files
that `wsiseg predict` writes and of QuPath, so a prediction corrected in QuPath comes back to the
same pixels.

Where annotations lie on one another the smaller is on top, as in QuPath, one of many parts as large
as all of them; of equal ones the later in the file. A pixel is in an annotation where its centre is
(see `wsiseg.datasets.rasterise`).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wsiseg.classes import IGNORE, Classes
from wsiseg.datasets.annotations import Annotation, Rings
from wsiseg.datasets.base import LabelledDataset, LabelledImage, UInt8
from wsiseg.datasets.qupath_config import QuPathConfig, classes_of, is_region, labels_of
from wsiseg.datasets.qupath_files import AnnotatedSlide, part_of, read_folder
from wsiseg.datasets.qupath_lost import Lost, covered, warn_of_lost
from wsiseg.datasets.rasterise import edges_of, fill
from wsiseg.errors import DatasetError, ResolutionError
from wsiseg.geometry import Box, Grid
from wsiseg.slides.slide import COARSE, Slide, open_slide


class _Shape(NamedTuple):
    """One polygon on a slide's grid.

    Attributes:
        value: label of its pixels.
        edges: see `edges_of`.
        box: the pixels that it can touch.
        order: shapes are painted in the order of this: regions and what has no class first, then
            those of larger annotations before those of smaller ones.
    """

    value: int
    edges: npt.NDArray[np.float64]
    box: Box
    order: tuple[bool, float]


class _Patch(NamedTuple):
    """A patch.

    Attributes:
        slide: number of its slide.
        box: on the slide's grid.
        shapes: numbers of the polygons that may lie in it, in the order in which they are painted.
    """

    slide: int
    box: Box
    shapes: tuple[int, ...]


class QuPathDataset(LabelledDataset):
    """Patches of annotated slides; a group is a slide."""

    def __init__(self, root: str | Path, part: str, config: QuPathConfig | None = None) -> None:
        """Read the annotations of a part and lay the patches.

        Patches are cells of a grid over each slide in which enough is annotated; at the right
        and lower edges they reach beyond the slide, white and unlabelled there. One warning tells
        the area of each class that is lost with cells in which too little is annotated.

        Args:
            root: the folder.
            part: all; or train and test, where `test` of the options names slides. Without
                that, train is all.
            config: options; default those of QuPathConfig.

        Raises:
            UsageError: no such part.
            DatasetError: nothing is annotated, a GeoJSON file is damaged, has no slide or does
                not fit it, or holds classes that the options do not name.
            SlideError: a slide that cannot be opened or does not state its resolution.
        """
        self.config = config = config or QuPathConfig()
        root = Path(root)
        everything = read_folder(root, config)
        self.classes = classes_of(config, [(s.geojson, s.annotations) for s in everything])
        self.slides = part_of(root, everything, part, config)
        self.measuring = part == "test"
        self.mpp = config.mpp
        self._grids = [self._grid(s) for s in self.slides]
        self._shapes = [
            _shapes(slide, grid, config, self.classes)
            for slide, grid in zip(self.slides, self._grids, strict=True)
        ]
        laid = [self._lay(i) for i in range(len(self.slides))]
        self._patches = [patch for kept, _ in laid for patch in kept]
        if not self._patches:
            raise DatasetError(
                f"{root}: no patch of {config.patch_px} px at {config.mpp:g} um/px has "
                f"{config.min_labelled:.2%} of it annotated; lower min_labelled"
            )
        warn_of_lost(root, [lost for _, lost in laid], config, self.classes)
        stems = [self.slides[p.slide].stem for p in self._patches]
        self.groups = tuple(stems)
        self.names = tuple(
            f"{stem}_x{p.box.x}_y{p.box.y}" for stem, p in zip(stems, self._patches, strict=True)
        )

    def __getitem__(self, index: int) -> LabelledImage:
        i, box, _ = self._patches[index]
        with self._open(self.slides[i]) as slide:
            image = slide.read(box, self._grids[i])
        return LabelledImage(self.names[index], image, self.mask(index), self.groups[index])

    def mask(self, index: int) -> UInt8:
        """(patch_px, patch_px) mask of a patch, without reading the slide."""
        return self._paint(self._patches[index])

    @property
    def files(self) -> tuple[int, ...]:
        """Number of the slide of each patch."""
        return tuple(p.slide for p in self._patches)

    def _open(self, item: AnnotatedSlide) -> Slide:
        """The slide; opened for each patch, so that any process and thread may read patches."""
        crop = self.config.coords == "qupath"
        try:
            return open_slide(item.slide, mpp=self.config.mpp_override, crop_to_bounds=crop)
        except ResolutionError as e:
            reason = str(e).partition(";")[0]
            raise ResolutionError(f"{reason}; set the option mpp_override") from e

    def _grid(self, item: AnnotatedSlide) -> Grid:
        with self._open(item) as slide:
            for text in slide.warnings:
                warnings.warn(f"{item.slide}: {text}", stacklevel=2)
            if slide.mpp > COARSE * self.mpp:
                warnings.warn(
                    f"{item.slide}: its pixels of {slide.mpp:g} um are enlarged to the {self.mpp:g}"
                    " um of the option mpp",
                    stacklevel=2,
                )
            return slide.grid(self.mpp)

    def _lay(self, i: int) -> tuple[list[_Patch], Lost]:
        """The patches of a slide with enough labelled pixels, row by row, and what others hold."""
        side, stride = self.config.patch_px, self.config.stride_px or self.config.patch_px
        columns, rows = (max(0, -(-(n - side) // stride)) + 1 for n in self._grids[i].size)
        places: dict[tuple[int, int], list[int]] = {}
        for number, shape in enumerate(self._shapes[i]):
            xs = _cells(shape.box.x, shape.box.right, side, stride)
            ys = _cells(shape.box.y, shape.box.bottom, side, stride)
            for y in range(ys.start, min(ys.stop, rows)):
                for x in range(xs.start, min(xs.stop, columns)):
                    places.setdefault((y, x), []).append(number)
        patches = [
            _Patch(i, Box(x * stride, y * stride, side, side), tuple(places[y, x]))
            for y, x in sorted(places)
        ]
        least = max(1.0, self.config.min_labelled * side * side)
        kept, few = [], []
        lost, total = np.zeros(256, np.int64), np.zeros(256, np.int64)
        for patch, (y, x) in zip(patches, sorted(places), strict=True):
            mask = self._paint(patch)
            labelled = np.sum(mask != IGNORE)
            # The pixels that no later patch has: each counts once.
            own = np.s_[: None if y == rows - 1 else stride, : None if x == columns - 1 else stride]
            total += np.bincount(mask[own].ravel(), minlength=256)
            if labelled >= least:
                kept.append(patch)
            elif labelled:
                few.append((patch, own))
        taken = {(p.box.x, p.box.y) for p in kept}
        for patch, own in few:
            mask = self._paint(patch)
            mask[covered(patch.box, taken, stride)] = IGNORE
            lost += np.bincount(mask[own].ravel(), minlength=256)
        return kept, Lost(len(few), lost[:IGNORE], total[:IGNORE])

    def _paint(self, patch: _Patch) -> UInt8:
        """(h, w) labels of a patch."""
        box = patch.box
        mask = np.full((box.height, box.width), IGNORE, np.uint8)
        seen = box.intersection(self._grids[patch.slide].box)
        for shape in (self._shapes[patch.slide][k] for k in patch.shapes):
            part = shape.box.intersection(seen)
            if not part.is_empty():
                place = Box(part.x - box.x, part.y - box.y, part.width, part.height)
                mask[place.slices][fill(shape.edges, part)] = shape.value
        return mask


def _cells(start: int, stop: int, side: int, stride: int) -> range:
    """Numbers of the patches along an axis that meet the pixels from start to stop."""
    return range(max(0, (start - side) // stride + 1), max(0, -(-stop // stride)))


def _shapes(
    slide: AnnotatedSlide, grid: Grid, config: QuPathConfig, classes: Classes
) -> list[_Shape]:
    """The polygons of a slide on its grid, in the order in which they are painted."""
    labels = labels_of(config, classes)
    shapes = []
    idle = sum(is_region(config, annotation) for annotation in slide.annotations)
    if idle and config.background is None:
        warnings.warn(
            f"{slide.geojson.name}: {idle} annotations of class {config.region} say nothing without"
            " the option background (in a YAML file for --dataset, a copy of"
            " configs/datasets/qupath.yaml)",
            stacklevel=2,
        )
    for annotation in slide.annotations:
        region = is_region(config, annotation)
        value = labels.get(annotation.class_name, IGNORE)  # not named: ends in '*', or no class
        if region:
            if config.background is None:
                continue
            value = classes.names.index(config.background)
        for rings in annotation.polygons:
            _check_place(slide, grid, annotation, rings)
        below = region or not annotation.class_name
        order = (not below, -sum(_net_area(rings) for rings in annotation.polygons))
        shapes += [_shape(rings, grid, value, order) for rings in annotation.polygons]
    return sorted(shapes, key=lambda s: s.order)


def _shape(rings: Rings, grid: Grid, value: int, order: tuple[bool, float]) -> _Shape:
    """A polygon on a grid."""
    scaled = [ring / np.asarray(grid.downsample) for ring in rings]
    low, high = np.floor(scaled[0].min(0)).astype(int), np.ceil(scaled[0].max(0)).astype(int)
    box = Box(int(low[0]), int(low[1]), int(high[0] - low[0]), int(high[1] - low[1]))
    return _Shape(value, edges_of(scaled), box, order)


def _net_area(rings: Rings) -> float:
    """Area of a polygon without its holes."""
    areas = [_area(ring) for ring in rings]
    return areas[0] - sum(areas[1:])


def _area(ring: npt.NDArray[np.float64]) -> float:
    x, y = ring.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _check_place(slide: AnnotatedSlide, grid: Grid, annotation: Annotation, rings: Rings) -> None:
    """Refuse a polygon that is not on the slide, or reaches farther out than the slide is long."""
    width, height = grid.level0
    reach = max(width, height)
    for ring in rings:
        (left, top), (right, bottom) = np.min(ring, axis=0), np.max(ring, axis=0)
        beside = right <= 0 or bottom <= 0 or left >= width or top >= height
        far = min(left, top) < -reach or right > width + reach or bottom > height + reach
        if beside or far:
            raise DatasetError(
                f"{slide.geojson}: feature {annotation.number} ({annotation.class_name}) lies "
                f"outside the slide {slide.slide.name} ({width} x {height} px); is it of another "
                "slide, or in the other frame (option coords)?"
            )
