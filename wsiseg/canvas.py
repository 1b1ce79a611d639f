"""The canvas: labels and confidences of one slide on disk, chunk by chunk. Knows no torch.

Inference fills a canvas, outputs read it; nothing else passes between them. A canvas is a zarr
group with

    labels      (H, W) uint8   0 = not analysed, 1..C = classes
    confidence  (H, W) uint8   probability of the label x 255, rounded; 0 where not analysed
    done        (R, K) uint8   1 where the chunk (row, column) holds its final values
    thumbnail   (h, w, 3) uint8 the slide, for the overview
    tissue      (h', w') uint8 1 = tissue, at the resolution of its detection

and a JSON record (attributes) of everything the output files state: grid, classes, slide, model,
parameters. Memory bound: a reader or writer holds the chunks of the box it was asked for.
A chunk is marked done only after its pixels are on disk, so what is done survives a kill.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from wsiseg.classes import Classes
from wsiseg.errors import CanvasError
from wsiseg.geometry import Box, Grid, Size

UInt8 = npt.NDArray[np.uint8]
FORMAT = 1
RECORD = "wsiseg"


class Canvas:
    """A canvas that is open for reading, or for reading and writing.

    Attributes:
        path: its folder.
        grid: the pixels it covers.
        classes: the classes of its labels.
        chunk_px: side of a chunk; chunks at the right and bottom edges are smaller.
        record: what was recorded of slide, model, parameters and run, ready for JSON. Keys
            `slide`, `model`, `parameters`; inference adds `timings` and `status` at the end
            through `update_record`.
    """

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        self._group = group
        meta = group.attrs.get(RECORD)
        if not isinstance(meta, Mapping) or meta.get("format") != FORMAT:
            raise CanvasError(f"{path}: not a wsiseg canvas of format {FORMAT}; predict again")
        g = meta["grid"]
        self.grid = Grid(Size(*g["level0"]), g["level0_mpp"], g["mpp"], Size(*g["size"]))
        self.classes = Classes.from_list(meta["classes"])
        self.chunk_px = int(meta["chunk_px"])
        self.record: dict[str, Any] = dict(meta["record"])
        self._labels: Any = group["labels"]
        self._confidence: Any = group["confidence"]
        self._done: Any = group["done"]
        self._done_cache: UInt8 = np.asarray(self._done[:])

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        grid: Grid,
        classes: Classes,
        record: Mapping[str, Any],
        chunk_px: int = 512,
    ) -> Canvas:
        """A new empty canvas in the folder `path`, replacing what is there.

        Raises:
            CanvasError: the folder cannot be written.
        """
        path = Path(path)
        width, height = grid.size
        rows, columns = -(-height // chunk_px), -(-width // chunk_px)
        chunk = (min(chunk_px, height), min(chunk_px, width))
        meta = {
            "format": FORMAT,
            "grid": {
                "level0": list(grid.level0),
                "level0_mpp": grid.level0_mpp,
                "mpp": grid.mpp,
                "size": list(grid.size),
            },
            "classes": classes.to_list(),
            "chunk_px": chunk_px,
            "record": json.loads(json.dumps(record)),
        }
        try:
            if path.exists():
                shutil.rmtree(path)
            group = zarr.open_group(str(path), mode="w")
            for name in ("labels", "confidence"):
                group.create_array(
                    name, shape=(height, width), chunks=chunk, dtype="uint8", fill_value=0
                )
            group.create_array(
                "done", shape=(rows, columns), chunks=(1, columns), dtype="uint8", fill_value=0
            )
            group.attrs[RECORD] = meta
        except OSError as e:
            raise CanvasError(f"{path}: cannot create the canvas ({e.strerror or e})") from e
        return cls(path, group)

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> Canvas:
        """The canvas in the folder `path`.

        Raises:
            CanvasError: there is none, or it is damaged or of another format.
        """
        path = Path(path)
        try:
            group = zarr.open_group(str(path), mode="r+" if writable else "r")
            return cls(path, group)
        except (OSError, KeyError, ValueError, TypeError) as e:
            raise CanvasError(f"{path}: not a readable wsiseg canvas ({e})") from e

    @property
    def chunk_rows(self) -> int:
        """Rows of chunks."""
        return int(self._done_cache.shape[0])

    @property
    def chunk_columns(self) -> int:
        """Columns of chunks."""
        return int(self._done_cache.shape[1])

    def chunk_box(self, row: int, column: int) -> Box:
        """The pixels of a chunk, clipped to the grid."""
        c = self.chunk_px
        return Box(column * c, row * c, c, c).intersection(self.grid.box)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """All (row, column), row by row."""
        for row in range(self.chunk_rows):
            for column in range(self.chunk_columns):
                yield row, column

    def is_done(self, row: int, column: int) -> bool:
        """Whether the chunk holds its final values."""
        return bool(self._done_cache[row, column])

    def write_chunk(self, row: int, column: int, labels: UInt8, confidence: UInt8) -> None:
        """Write the final values of one chunk, then mark it done.

        Args:
            row: chunk row.
            column: chunk column.
            labels: (h, w) uint8 values on disk, of the size of `chunk_box(row, column)`.
            confidence: (h, w) uint8, probability x 255.

        Raises:
            CanvasError: wrong shape, or the disk does not take it.
        """
        box = self.chunk_box(row, column)
        expected = (box.height, box.width)
        if labels.shape != expected or confidence.shape != expected:
            raise CanvasError(
                f"chunk ({row}, {column}) is {expected}, not {labels.shape} and {confidence.shape}"
            )
        try:
            self._labels[box.slices] = labels
            self._confidence[box.slices] = confidence
            self._done_cache[row, column] = 1
            self._done[row, :] = self._done_cache[row]
        except OSError as e:
            raise CanvasError(f"{self.path}: cannot write ({e.strerror or e})") from e

    def labels(self, box: Box) -> UInt8:
        """(h, w) uint8 labels of a box inside the grid."""
        return np.asarray(self._labels[box.slices])

    def confidence(self, box: Box) -> UInt8:
        """(h, w) uint8 confidences of a box inside the grid."""
        return np.asarray(self._confidence[box.slices])

    def set_image(self, name: str, image: UInt8) -> None:
        """Keep a small picture (`thumbnail` or `tissue`) in the canvas."""
        try:
            array = self._group.create_array(
                name, shape=image.shape, chunks=image.shape, dtype="uint8", overwrite=True
            )
            array[...] = image
        except OSError as e:
            raise CanvasError(f"{self.path}: cannot write ({e.strerror or e})") from e

    def image(self, name: str) -> UInt8 | None:
        """A picture kept by `set_image`, or None."""
        if name not in self._group:
            return None
        array: Any = self._group[name]
        return np.asarray(array[...])

    def update_record(self, **entries: Any) -> None:
        """Add entries to the record and keep it on disk."""
        self.record.update(json.loads(json.dumps(entries)))
        meta: Any = self._group.attrs[RECORD]
        try:
            self._group.attrs[RECORD] = {**meta, "record": self.record}
        except OSError as e:
            raise CanvasError(f"{self.path}: cannot write ({e.strerror or e})") from e

    def pixel_counts(self) -> list[int]:
        """Pixels per value on disk, index 0..C; reads one row of chunks at a time."""
        counts = np.zeros(256, np.int64)
        for row in range(self.chunk_rows):
            y = row * self.chunk_px
            box = Box(0, y, self.grid.size.width, self.chunk_px).intersection(self.grid.box)
            counts += np.bincount(self.labels(box).ravel(), minlength=256)
        return [int(n) for n in counts[: len(self.classes) + 1]]

    def areas_mm2(self) -> dict[str, float]:
        """Square millimetres per class name."""
        counts = self.pixel_counts()
        unit = self.grid.pixel_area_um2 / 1e6
        return {item.name: counts[value] * unit for value, item in self.classes.values()}

    def remove(self) -> None:
        """Delete the canvas from disk."""
        shutil.rmtree(self.path, ignore_errors=True)
