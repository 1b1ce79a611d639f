"""Pixels of any part of a synthetic slide. Knows the layout and the brushes, no files.

Stroma and glass are textures that repeat every 1024 px; every gland is one of 32 painted pictures
with a strip of stroma around it, mirrored at random and laid over the stroma. So pixels cost
little more than copying, and do not depend on the box they are rendered with.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsiseg.geometry import Box, Size
from wsiseg.slides.phantom_brush import GLAND, GLASS, STROMA, Style, paint
from wsiseg.slides.phantom_layout import HALO_UM, Gland, Layout, Shape

UInt8 = npt.NDArray[np.uint8]
_TEXTURE_PX = 1024
_FIELD_PX = 16
_BLOCK_PX = 256
_CORE_UM = 4.5


class Stamp:
    """A painted gland: picture, labels, and how opaque it lies over the stroma.

    Attributes:
        rgb: (h, w, 3) uint8.
        gland: (h, w) bool.
        halo: (h, w, 1) uint16, 0 .. 256: how opaque gland and halo lie over the stroma.
        core: (h, w, 1) uint16, 0 .. 256: the same for the gland with its basement membrane.
    """

    def __init__(self, shape: Shape, *, mpp: float, rng: np.random.Generator) -> None:
        half_w, half_h = (math.ceil((s + HALO_UM) / mpp) for s in shape.semi)
        y, x = np.mgrid[-half_h:half_h, -half_w:half_w] + 0.5
        x, y = x * mpp / shape.semi[0], y * mpp / shape.semi[1]
        angle, radius = np.arctan2(y, x), np.hypot(x, y)
        bend = sum(a * np.cos(k * angle + p) for k, a, p in shape.waves)
        self.gland = radius < np.clip(1 + bend, 0.6, 1.06)
        labels = np.where(self.gland, GLAND, STROMA).astype(np.uint8)
        style = Style(shape.goblet, shape.epithelium_um)
        self.rgb = paint(labels, mpp=mpp, rng=rng, style=style)
        away = ndimage.distance_transform_edt(~self.gland) * mpp
        self.halo = _fade(away, _CORE_UM, HALO_UM - 1)
        self.core = _fade(away, 0.7, 2.2)


class Paints:
    """The pictures that the synthetic slides of a seed are put together from.

    Memory bound: two textures of 3 MB and at most 32 stamps of about 1 MB at 0.5 um per pixel.

    Attributes:
        stroma: (1024, 1024, 3) uint8 texture that repeats.
        glass: the same of empty glass.
    """

    def __init__(self, mpp: float, seed: int) -> None:
        self._mpp = mpp
        self._seed = seed
        side = (_TEXTURE_PX, _TEXTURE_PX)
        self.stroma = paint(np.full(side, STROMA, np.uint8), mpp=mpp, rng=self._rng(0), wrap=True)
        self.glass = paint(np.full(side, GLASS, np.uint8), mpp=mpp, rng=self._rng(1), wrap=True)
        self._stamps: dict[int, Stamp] = {}

    def stamp(self, shape: Shape) -> Stamp:
        """The picture of a shape, painted when it is first asked for."""
        if shape.number not in self._stamps:
            rng = self._rng(2 + shape.number)
            self._stamps[shape.number] = Stamp(shape, mpp=self._mpp, rng=rng)
        return self._stamps[shape.number]

    def _rng(self, key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, 77, key])


class World:
    """A synthetic slide: its layout and its pictures."""

    def __init__(self, size: Size, *, mpp: float, seed: int) -> None:
        self.mpp = mpp
        self.layout = Layout(size.width * mpp, size.height * mpp, seed)
        self.paints = _paints(mpp, seed)

    def render(self, box: Box) -> tuple[UInt8, UInt8]:
        """See `render_phantom`."""
        rgb = _tile(self.paints.glass, box)
        labels = np.full((box.height, box.width), GLASS, np.uint8)
        blocks = self._tissue_blocks(box)
        if not blocks:
            return rgb, labels
        tissue = _tile(self.paints.stroma, box)
        marks = np.full_like(labels, STROMA)
        k = self.mpp
        near = self.layout.glands(box.x * k, box.y * k, box.right * k, box.bottom * k)
        for gland in near:
            self._lay(gland, box, tissue, None)
        for gland in near:
            self._lay(gland, box, tissue, marks)
        for block, inside in blocks:
            at = Box(block.x - box.x, block.y - box.y, block.width, block.height).slices
            if inside is None:
                rgb[at], labels[at] = tissue[at], marks[at]
                continue
            cover = np.clip(inside / (1.5 * self.mpp) + 0.5, 0, 1)[..., None].astype(np.float32)
            mixed = tissue[at] * cover + rgb[at] * (1 - cover)
            rgb[at] = (mixed + np.float32(0.5)).astype(np.uint8)
            labels[at] = np.where(cover[..., 0] >= 0.5, marks[at], GLASS)
        return rgb, labels

    def _lay(self, gland: Gland, box: Box, rgb: UInt8, labels: UInt8 | None) -> None:
        """Lay a gland with its halo over the tissue of a box, or, with labels, its core.

        All halos lie below all cores, so that a gland is not covered by its neighbour's stroma.
        """
        stamp = self.paints.stamp(gland.shape)
        height, width = stamp.gland.shape
        x = round(gland.x / self.mpp) - width // 2
        y = round(gland.y / self.mpp) - height // 2
        part = Box(x, y, width, height).intersection(box)
        if part.is_empty():
            return
        flip = (
            slice(None, None, -1 if gland.flip_y else 1),
            slice(None, None, -1 if gland.flip_x else 1),
        )
        source = Box(part.x - x, part.y - y, part.width, part.height).slices
        at = Box(part.x - box.x, part.y - box.y, part.width, part.height).slices
        opaque = (stamp.halo if labels is None else stamp.core)[flip][source]
        over = stamp.rgb[flip][source]
        mixed = (over * opaque + rgb[at] * (256 - opaque) + 128) >> 8
        rgb[at] = mixed.astype(np.uint8)
        if labels is not None:
            labels[at][stamp.gland[flip][source]] = GLAND

    def _tissue_blocks(self, box: Box) -> list[tuple[Box, npt.NDArray[np.float64] | None]]:
        """The parts of a box with tissue, each with `inside_um` per pixel, None where all is.

        The field is known on a lattice of 16 px and interpolated, so that its extremes on a part
        are those of the lattice points around it.
        """
        x0, y0 = box.x // _FIELD_PX, box.y // _FIELD_PX
        xs = np.arange(x0, (box.right - 1) // _FIELD_PX + 2) * float(_FIELD_PX * self.mpp)
        ys = np.arange(y0, (box.bottom - 1) // _FIELD_PX + 2) * float(_FIELD_PX * self.mpp)
        field = self.layout.inside_um(xs[None, :].astype(float), ys[:, None].astype(float))
        found: list[tuple[Box, npt.NDArray[np.float64] | None]] = []
        for y in range(box.y - box.y % _BLOCK_PX, box.bottom, _BLOCK_PX):
            for x in range(box.x - box.x % _BLOCK_PX, box.right, _BLOCK_PX):
                block = Box(x, y, _BLOCK_PX, _BLOCK_PX).intersection(box)
                part = field[
                    block.y // _FIELD_PX - y0 : (block.bottom - 1) // _FIELD_PX + 2 - y0,
                    block.x // _FIELD_PX - x0 : (block.right - 1) // _FIELD_PX + 2 - x0,
                ]
                if part.max() <= -self.mpp:
                    continue
                found.append((block, None if part.min() > self.mpp else _spread(part, block)))
        return found


@lru_cache(maxsize=4)
def _paints(mpp: float, seed: int) -> Paints:
    return Paints(mpp, seed)


@lru_cache(maxsize=2)
def _world(size: Size, mpp: float, seed: int) -> World:
    return World(size, mpp=mpp, seed=seed)


def render_phantom(box: Box, size: Size, *, mpp: float, seed: int) -> tuple[UInt8, UInt8]:
    """A part of a synthetic slide, the same however it is cut.

    Args:
        box: the part, in level-0 pixels.
        size: size of the whole slide; decides where its tissue lies.
        mpp: micrometres per pixel.
        seed: decides everything else.

    Returns:
        (h, w, 3) uint8 RGB, and (h, w) uint8 labels: 0 glass, 1 stroma, 2 gland with its lumen.
    """
    return _world(Size(*size), float(mpp), int(seed)).render(box)


def _fade(
    away_um: npt.NDArray[np.float64], full_um: float, none_um: float
) -> npt.NDArray[np.uint16]:
    """(h, w, 1): 256 up to a distance of `full_um`, falling to 0 at `none_um`."""
    share = np.clip((none_um - away_um) / (none_um - full_um), 0, 1)
    return np.asarray(np.round(256 * share)[..., None], np.uint16)


def _tile(texture: UInt8, box: Box) -> UInt8:
    """A box of a texture that repeats."""
    rows = np.arange(box.y, box.bottom) % len(texture)
    start = box.x % texture.shape[1]
    repeats = -(-(start + box.width) // texture.shape[1])
    wide = np.concatenate([texture] * repeats, axis=1) if repeats > 1 else texture
    return np.asarray(wide[rows, start : start + box.width])


def _spread(field: npt.NDArray[np.float64], block: Box) -> npt.NDArray[np.float64]:
    """The field of the lattice points around a block, interpolated to its pixels."""
    y = (np.arange(block.y, block.bottom) % _FIELD_PX) / _FIELD_PX
    x = (np.arange(block.x, block.right) % _FIELD_PX) / _FIELD_PX
    row = np.arange(block.y, block.bottom) // _FIELD_PX - block.y // _FIELD_PX
    column = np.arange(block.x, block.right) // _FIELD_PX - block.x // _FIELD_PX
    lines = field[row] * (1 - y[:, None]) + field[row + 1] * y[:, None]
    return np.asarray(lines[:, column] * (1 - x) + lines[:, column + 1] * x)
