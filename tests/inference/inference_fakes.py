"""Slides, tissue and networks in memory, for tests of inference."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wsiseg.classes import Classes, TissueClass
from wsiseg.geometry import Box, Grid, Point, Size
from wsiseg.models.base import FeatureExtractor, Features, FeatureSpec, Head, lay_out
from wsiseg.models.extractors.stain import StainConfig, StainExtractor
from wsiseg.models.heads.threshold import ThresholdConfig, ThresholdHead
from wsiseg.models.segmenter import ModelInfo, Segmenter

CLASSES = Classes((TissueClass("rest", (0, 0, 200), True), TissueClass("nuclei", (200, 0, 0))))


class MemorySlide:
    """A slide whose level 0, at 0.5 um per pixel, is an array."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.path = Path("memory.svs")
        self.backend, self.vendor, self.frame = "memory", "test", "qupath"
        self.size = Size(pixels.shape[1], pixels.shape[0])
        self.mpp, self.mpp_source = 0.5, "option"
        self.bounds: Box | None = None
        self.quickhash: str | None = "0" * 64
        self.reads: list[Point] = []
        self._lock = threading.Lock()

    def grid(self, mpp: float) -> Grid:
        return Grid.at_mpp(self.size, self.mpp, mpp)

    def read(self, box: Box, grid: Grid) -> np.ndarray:
        assert grid.size == self.size, "fakes are read at their own resolution"
        with self._lock:
            self.reads.append(Point(box.x, box.y))
        tile = np.full((box.height, box.width, 3), 255, np.uint8)
        common = box.intersection(grid.box)
        inside = Box(common.x - box.x, common.y - box.y, common.width, common.height)
        tile[inside.slices] = self.pixels[common.slices]
        return tile

    def thumbnail(self, max_px: int) -> np.ndarray:
        step = max(1, -(-max(self.size) // max_px))
        return self.pixels[::step, ::step]


class MemoryTissue:
    """Tissue by a boolean array over the grid's own pixels."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask

    def covers(self, box: Box, grid: Grid) -> bool:
        return bool(self.mask[box.slices].any())

    def region(self, box: Box, grid: Grid) -> np.ndarray:
        return self.mask[box.slices]


class NoiseExtractor(FeatureExtractor):
    """The mean colour plus noise of (seed, place); keeps count of what it was asked for."""

    def __init__(self, tile_px: int) -> None:
        super().__init__()
        self.tile_px = tile_px
        self.specs = (FeatureSpec(3, tile_px // 4), FeatureSpec(2, tile_px))
        self.seen: list[Point] = []
        self.batches: list[int] = []

    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        self.seen.extend(places)
        self.batches.append(len(places))
        colour = torch.nn.functional.avg_pool2d(images, self.tile_px // 4)
        noise = [
            torch.randn(2, 1, 1, generator=torch.Generator().manual_seed(hash((seed, *place))))
            for place in places
        ]
        return colour, torch.stack(noise)


class SumHead(Head):
    """Two classes from the features of `NoiseExtractor`, smoothed over a window's tiles."""

    class_count = 2

    def __init__(self, tile_px: int) -> None:
        super().__init__()
        self.tile_px = tile_px

    def forward(self, features: Features) -> Tensor:
        colour, noise = (lay_out(f.float()) for f in features)
        size = noise.shape[-1] * self.tile_px
        up = torch.nn.functional.interpolate
        z = up(colour.mean(1, keepdim=True), size=size, mode="bilinear", align_corners=False)
        z = 4 * z + up(noise.mean(1, keepdim=True), size=size, mode="nearest")
        return torch.cat((-z, z), dim=1)


def model_info(window_px: int, tile_px: int) -> ModelInfo:
    return ModelInfo("fake", "0" * 64, CLASSES, 0.5, window_px, tile_px, licence="none")


def noise_model(window_px: int = 96, tile_px: int = 32) -> Segmenter:
    return Segmenter(NoiseExtractor(tile_px), SumHead(tile_px), model_info(window_px, tile_px))


def stain_model(window_px: int = 96, tile_px: int = 32) -> Segmenter:
    extractor = StainExtractor(StainConfig(tile_px=tile_px))
    return Segmenter(extractor, ThresholdHead(ThresholdConfig()), model_info(window_px, tile_px))


def random_slide(width: int, height: int, seed: int = 0) -> MemorySlide:
    """Smooth random colours."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return MemorySlide(coarse.repeat(8, 0).repeat(8, 1)[:height, :width])
