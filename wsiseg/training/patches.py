"""Numbered training patches of a labelled data set, made ahead in threads. Knows no networks.

Patch k is a function of (seed, k) alone, so a run that is resumed, or shared by several
processes, sees what an uninterrupted one would.

Memory bound: of the images, as they are at the training resolution, at most `cache_mb` are held;
the rest is read again when its turn comes. Images of one file are taken close to one another.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsiseg.classes import IGNORE
from wsiseg.datasets.augment import AugmentConfig, at_mpp, random_patch
from wsiseg.datasets.base import LabelledDataset, LabelledImage
from wsiseg.errors import ConfigError, DatasetError
from wsiseg.geometry import Point
from wsiseg.slides.slide import COARSE
from wsiseg.training.background import UNDRAWN, Background
from wsiseg.training.borders import border_band, touching
from wsiseg.training.labelmaps import LabelMap
from wsiseg.training.threads import batch_threads

UInt8 = npt.NDArray[np.uint8]
FILES_AT_ONCE = 16
"""Files whose images are mixed with one another in an epoch's order."""
BORDER = 128
"""Added to the class of pixels in the border of an object, within this module; 255 is ignored."""
TOUCHING = 32
"""Added to the class of pixels between two objects, within this module."""


class Batch(NamedTuple):
    """Patches to train on.

    Attributes:
        numbers: the patches' numbers.
        images: (B, H, W, 3) uint8.
        masks: (B, H, W) uint8 classes, 255 = ignore.
        borders: (B, H, W) bool, the band inside the edge of every object; False everywhere where
            no borders are learnt.
        undrawn: (B, H, W) bool, pixels of objects whose borders nobody drew.
        touching: (B, H, W) bool, what lies no farther than a border's width from two objects.
        places: where in the world of the noise each patch lies.
    """

    numbers: tuple[int, ...]
    images: UInt8
    masks: UInt8
    borders: npt.NDArray[np.bool_]
    undrawn: npt.NDArray[np.bool_]
    touching: npt.NDArray[np.bool_]
    places: list[Point]

    def one(self, index: int) -> Batch:
        """The batch of one of the patches."""
        only = slice(index, index + 1)
        return Batch(
            self.numbers[only],
            self.images[only],
            self.masks[only],
            self.borders[only],
            self.undrawn[only],
            self.touching[only],
            self.places[only],
        )


class ImageStore:
    """Images and masks of a data set as training sees them, the latest ones kept in memory."""

    def __init__(
        self,
        dataset: LabelledDataset,
        prepare: Callable[[UInt8, UInt8], tuple[UInt8, UInt8]],
        *,
        limit_bytes: int,
        border_px: float = 0.0,
    ) -> None:
        """`prepare` brings an image and its mask to the training resolution and stain.

        With `border_px` above 0 the masks have `BORDER` added within that distance, in pixels of
        the data set, of an edge of an object, and `TOUCHING` where two objects are as near.
        `held_bytes` says how much is kept, `files` which file each image is of.
        """
        self._dataset, self._prepare, self._limit = dataset, prepare, limit_bytes
        self._border_px, self.with_borders = border_px, border_px > 0
        if self.with_borders and len(dataset.classes) >= TOUCHING:
            raise ConfigError(f"border_um: only with fewer than {TOUCHING} classes")
        self.files = dataset.files
        self._kept: OrderedDict[int, tuple[UInt8, UInt8]] = OrderedDict()
        self.held_bytes = 0
        self._lock = threading.Lock()

    def get(self, index: int) -> tuple[UInt8, UInt8]:
        """Image (H, W, 3) and mask (H, W)."""
        with self._lock:
            if index in self._kept:
                self._kept.move_to_end(index)
                return self._kept[index]
        item = self._dataset[index]
        pair = self._prepare(item.image, self._with_border(item))
        with self._lock:
            if index not in self._kept:
                self._kept[index] = pair
                self.held_bytes += pair[0].nbytes + pair[1].nbytes
            while self.held_bytes > self._limit and len(self._kept) > 1:
                _, old = self._kept.popitem(last=False)
                self.held_bytes -= old[0].nbytes + old[1].nbytes
        return pair

    def _with_border(self, item: LabelledImage) -> UInt8:
        if not self._border_px:
            return item.mask
        if item.instances is None:
            raise DatasetError(
                f"{item.name}: has no instances to learn borders from; set border_um to 0"
            )
        numbered = LabelMap(item.instances).labels  # 1, 2, ...: time and memory go by the largest
        band = border_band(numbered, self._border_px)
        between = touching(numbered, self._border_px)
        marks = np.uint8(BORDER) * band + np.uint8(TOUCHING) * between
        marked: UInt8 = item.mask + marks * (item.mask != IGNORE)
        return marked


def to_resolution(
    image: UInt8, mask: UInt8, *, ratio: float, resize_px: int | None
) -> tuple[UInt8, UInt8]:
    """Image and mask scaled by `ratio`, or stretched to a square of `resize_px`."""
    if resize_px is None:
        return at_mpp(image, mask, ratio)
    size = (resize_px, resize_px)
    labels = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
    return stretch(image, resize_px), np.asarray(labels)


def warn_of_enlarging(mpp: float, model_mpp: float) -> None:
    """Warn where labelled images are much coarser than what a model is made for."""
    if mpp > COARSE * model_mpp:
        warnings.warn(
            f"the images are read at {mpp:g} um per pixel and enlarged to the {model_mpp:g} of the "
            "model, which on slides sees sharper ones; choose a finer mpp of the data set (in a "
            "YAML file for --dataset) or another mpp of the run",
            stacklevel=2,
        )


def stretch(image: UInt8, side_px: int) -> UInt8:
    """An image (H, W, 3) stretched to a square, bicubically (shrinking is filtered by Pillow)."""
    size = (side_px, side_px)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


class Patches:
    """The endless sequence of augmented patches of some images."""

    def __init__(
        self,
        store: ImageStore,
        indices: Sequence[int],
        *,
        size_px: tuple[int, int],
        augment: AugmentConfig,
        seed: int,
        background: Background | None = None,
    ) -> None:
        """Patches of the images `indices` of a store.

        `size_px` is (height, width) of a patch; some are of `background` instead, of whose sources
        with smaller images is warned.
        """
        if background is not None:
            background.warn_of_small(size_px, augment.scale)
        self.background = background
        self.store, self.size_px, self.augment, self.seed = store, size_px, augment, seed
        self._blocks = _blocks(indices, store.files)
        self._count = len(indices)
        self._orders: dict[int, npt.NDArray[np.int64]] = {}
        self._lock = threading.Lock()

    def patch(self, number: int) -> tuple[UInt8, UInt8, Point]:
        """Image, mask (with `BORDER` or `UNDRAWN` added, see there) and place of a patch."""
        epoch, position = divmod(number, self._count)
        rng = np.random.default_rng((self.seed, 2, number))
        other = self.background
        if other is not None and other.share and rng.random() < other.share:
            patch, target = other.patch(self.size_px, rng, self.augment)
        else:
            image, mask = self.store.get(int(self.order(epoch)[position]))
            patch, target = random_patch(image, mask, self.size_px, rng=rng, config=self.augment)
        if other is not None and other.glass and rng.random() < other.glass:
            patch, target = other.with_glass(patch, target, rng)
        return patch, target, Point(int(rng.integers(1 << 16)), int(rng.integers(1 << 16)))

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The images of an epoch: all of them, once, mixed within blocks of files."""
        with self._lock:
            return self._order(epoch)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        kept = self._orders.get(epoch)
        if kept is None:
            rng = np.random.default_rng((self.seed, 1, epoch))
            files = [self._blocks[int(i)] for i in rng.permutation(len(self._blocks))]
            span = len(files) if all(len(f) == 1 for f in files) else FILES_AT_ONCE
            starts = range(0, len(files), span)
            kept = np.concatenate(
                [rng.permutation(np.concatenate(files[i : i + span])) for i in starts]
            )
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = kept
        return kept

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The patches of these numbers."""
        images, masks, places = zip(*(self.patch(n) for n in numbers), strict=True)
        labels = np.stack(masks)
        known = (labels != IGNORE) & self.store.with_borders
        classes: UInt8 = np.where(known, labels % TOUCHING, labels)
        return Batch(
            tuple(numbers),
            np.stack(images),
            classes,
            known & (labels & BORDER > 0),
            known & (labels & UNDRAWN > 0),
            known & (labels & TOUCHING > 0),
            list(places),
        )

    def batches(
        self, size: int, *, start: int = 0, share: tuple[int, int] = (0, 1), pool: int = 0
    ) -> Iterator[Batch]:
        """Batches start, start + 1, ..., made ahead in threads, one more than there are of these.

        Args:
            size: patches of a batch.
            start: number of the first batch.
            share: (process, processes): which of each batch's patches to give.
            pool: 0, or after how many patches the sequence begins again, but not before it has
                gone through all images (background takes the places of some).
        """
        pool = max(pool, self._count) if pool else 0

        def make(batch: int) -> Batch:
            numbers = range(batch * size, (batch + 1) * size)[share[0] :: share[1]]
            return self.batch([n % pool if pool else n for n in numbers])

        threads = batch_threads(share[1])
        with ThreadPoolExecutor(threads, thread_name_prefix="patches") as workers:
            number = start + threads + 1
            waiting = deque(workers.submit(make, n) for n in range(start, number))
            while True:
                batch = waiting.popleft().result()
                waiting.append(workers.submit(make, number))
                number += 1
                yield batch


def _blocks(indices: Sequence[int], files: Sequence[int]) -> list[npt.NDArray[np.int64]]:
    """The indices, those of one file together."""
    found: dict[int, list[int]] = {}
    for i in indices:
        found.setdefault(files[i], []).append(i)
    return [np.asarray(block, np.int64) for block in found.values()]
