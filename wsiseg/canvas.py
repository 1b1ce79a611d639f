"""The canvas: labels and confidences of one slide on disk, chunk by chunk. Knows no torch.

Inference fills a canvas, outputs read it; nothing else passes between them. A canvas is a zarr
group with

    labels      (H, W) uint8   0 = not analysed, 1..C = classes
    confidence  (H, W) uint8   probability of the label x 255, rounded; 0 where not analysed
    done        (R, K) uint32  checksum of the chunk (row, column) that holds what the model gave,
                               0 where it does not yet
    border      (H, W) uint8   where the model has borders: probability of the border of an
                               object x 255, rounded; 0 where not analysed
    cleaned     (H, W) uint8   where the model asks for it: the labels after post-processing
    objects     (H, W) int32   where the model has borders: 1.. = objects, 0 = none
    thumbnail   (h, w, 3) uint8 the slide, for the overview
    tissue      (h', w') uint8 1 = tissue, at the resolution of its detection

and a JSON record (attributes) of everything the output files state: grid, classes, slide, model,
parameters, and the number of objects by class once they are made. Memory bound: a reader or writer
holds the chunks of the box it was asked for.
A chunk is marked done after its pixels, so a kill loses nothing; its checksum tells of a lost disk.
Post-processing leaves the planes of the done chunks as they are, so it can be begun again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from wsiseg import canvas_store as store
from wsiseg.canvas_store import DAMAGES, RECORD, Planes, checksum, line
from wsiseg.classes import Classes
from wsiseg.errors import CanvasError, ConfigError
from wsiseg.geometry import Box, Grid, Size

UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]
FORMAT = 1
NAMES = ("labels", "confidence", "border")
"""Planes of what the model gives; the border just where there is one."""


class Canvas:
    """A canvas that is open for reading, or for reading and writing.

    Attributes:
        path: its folder.
        grid: the pixels it covers.
        classes: the classes of its labels.
        chunk_px: side of a chunk; chunks at the right and bottom edges are smaller.
        has_border: whether there are probabilities of borders.
        final: the plane of its labels: `cleaned`, or `labels` where none were replaced.
        record: what was recorded of slide, model, parameters and run, ready for JSON. Keys
            `slide`, `model`, `parameters`, and `identity` of what may continue it; inference adds
            `timings`, `status` and `chunks` (how many are done) at the end, and `objects` (class
            name to number) if it makes any.
    """

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        meta = group.attrs.get(RECORD)
        if not isinstance(meta, Mapping) or meta.get("format") != FORMAT:
            raise CanvasError(f"{path}: not a wsiseg canvas of format {FORMAT}; predict again")
        g = meta["grid"]
        self.grid = Grid(Size(*g["level0"]), g["level0_mpp"], g["mpp"], Size(*g["size"]))
        self.classes = Classes.from_list(meta["classes"])
        self.chunk_px = int(meta["chunk_px"])
        self.record: dict[str, Any] = dict(meta["record"])
        self._planes = Planes(path, group)
        self.has_border = self._planes.has("border")
        self.final = "cleaned" if self._planes.has("cleaned") else "labels"
        self._done_cache: npt.NDArray[Any] = self._planes.read_rows("done")
        self._marking = threading.Lock()

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        grid: Grid,
        classes: Classes,
        record: Mapping[str, Any],
        chunk_px: int = 512,
        border: bool = False,
    ) -> Canvas:
        """A new empty canvas in the folder `path`, replacing what is there.

        With `border` it takes the probabilities of borders beside the labels.

        Raises:
            CanvasError: the folder cannot be written.
        """
        path = Path(path)
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
        names = NAMES[: 3 if border else 2]
        try:
            store.replace_folder(path, lambda folder: store.fill(folder, meta, names))
            return cls(path, zarr.open_group(str(path), mode="r+"))
        except OSError as e:
            raise store.unwritable(path, e) from e

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> Canvas:
        """The canvas in the folder `path`.

        Raises:
            CanvasError: there is none, or it is damaged or of another format.
        """
        path = Path(path)
        try:
            if writable:
                store.sweep(path)
            group = zarr.open_group(str(path), mode="r+" if writable else "r")
            return cls(path, group)
        except (*DAMAGES, AttributeError, ConfigError) as e:
            raise CanvasError(f"{path}: not a readable wsiseg canvas ({line(e)})") from e

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

    def recheck(self) -> int:
        """Read all chunks that are done; how many were not what was written, and are not done now.

        Raises:
            CanvasError: it lacks more than chunks.
        """
        names, damaged = NAMES[: 2 + self.has_border], 0
        self._planes.require(*names)
        for key in (key for key in self.chunks() if self.is_done(*key)):
            slices, found = self.chunk_box(*key).slices, 0
            with suppress(CanvasError):
                found = checksum(self._planes.read(name, slices) for name in names)
            if found != self._done_cache[key]:
                self._done_cache[key] = 0
                damaged += 1
        return damaged

    @property
    def done_count(self) -> int:
        """How many chunks are done."""
        return int(np.count_nonzero(self._done_cache))

    @property
    def has_objects(self) -> bool:
        """Whether objects were made, all of them."""
        return "objects" in self.record and self._planes.has("objects")

    def write_chunk(
        self, row: int, column: int, labels: UInt8, confidence: UInt8, border: UInt8 | None = None
    ) -> None:
        """Write the final values of one chunk, then mark it done; threads may write several.

        Args:
            row, column: of the chunk, which no other thread writes.
            labels: (h, w) uint8 values on disk, of the size of `chunk_box(row, column)`.
            confidence: (h, w) uint8, probability x 255.
            border: likewise, just where the canvas has borders.

        Raises:
            CanvasError: wrong shape, or the disk does not take it.
        """
        expected = tuple(s.stop - s.start for s in self.chunk_box(row, column).slices)
        planes = {"labels": labels, "confidence": confidence}
        if border is not None:
            planes["border"] = border
        shapes = [p.shape for p in planes.values()]
        if shapes != [expected] * (2 + self.has_border):
            raise CanvasError(f"chunk ({row}, {column}) is {expected}, not {shapes}")
        for name, plane in planes.items():
            self._planes.put_chunk(name, (row, column), plane)
        written = checksum(planes.values())
        with self._marking:  # a row on disk names only chunks whose pixels are there
            self._done_cache[row, column] = written
            self._planes.put_chunk("done", (row, 0), self._done_cache[row : row + 1])

    def labels(self, box: Box, *, given: bool = False) -> UInt8:
        """(h, w) uint8 labels of a box inside the grid; `given`: as the model gave them."""
        return self._planes.read("labels" if given else self.final, box.slices)

    def confidence(self, box: Box) -> UInt8:
        """(h, w) uint8 confidences of a box inside the grid."""
        return self._planes.read("confidence", box.slices)

    def border(self, box: Box) -> UInt8:
        """(h, w) uint8 probabilities of borders, of a canvas that has them."""
        return self._planes.read("border", box.slices)

    def objects(self, box: Box) -> Int32:
        """(h, w) int32 objects of a box inside the grid, 0 = none; see `write_objects`."""
        return self._planes.read("objects", box.slices)

    def colours(self, box: Box) -> UInt8 | Int32:
        """(h, w) what neighbouring pixels have in common if they are of one region, 0 where not
        analysed: the labels, or where objects were made their numbers (int32), and minus the label
        of what belongs to none."""
        labels = self.labels(box)
        if not self.has_objects:
            return labels
        objects = self.objects(box)
        return np.where(objects > 0, objects, -labels.astype(np.int32))

    def write_labels(self, box: Box, labels: UInt8) -> None:
        """Replace labels of a complete canvas; those that the model gave are kept beside them."""
        if self.final != "cleaned":
            self._planes.new("cleaned", "uint8")
            for row in range(self.chunk_rows):
                own = self._row_box(row).slices
                self._planes.put("cleaned", own, self._planes.read("labels", own))
            self.final = "cleaned"
        self._planes.put("cleaned", box.slices, labels)

    def restore_labels(self) -> None:
        """Go back to the labels that the model gave."""
        self.final = "labels"
        self._planes.drop("cleaned")

    def write_objects(self, box: Box, objects: Int32) -> None:
        """Write the objects of a box; `record["objects"]` says that all are there."""
        if not self._planes.has("objects"):
            self._planes.new("objects", "int32")
        self._planes.put("objects", box.slices, objects)

    def _row_box(self, row: int) -> Box:
        """The pixels of a row of chunks."""
        y = row * self.chunk_px
        return Box(0, y, self.grid.size.width, self.chunk_px).intersection(self.grid.box)

    def set_image(self, name: str, image: UInt8) -> None:
        """Keep a small picture (`thumbnail` or `tissue`) in the canvas."""
        self._planes.put_image(name, image)

    def image(self, name: str) -> UInt8 | None:
        """A picture kept by `set_image`, or None."""
        return self._planes.read(name, ...) if self._planes.has(name) else None

    def update_record(self, **entries: Any) -> None:
        """Add entries to the record and keep it on disk."""
        self.replace_record({**self.record, **entries})

    def replace_record(self, record: Mapping[str, Any]) -> None:
        """Take another record and keep it on disk."""
        self.record = json.loads(json.dumps(record))
        self._planes.update_meta(record=self.record)

    def pixel_counts(self) -> list[int]:
        """Pixels per value on disk, index 0..C; reads one row of chunks at a time."""
        counts = np.zeros(256, np.int64)
        for row in range(self.chunk_rows):
            counts += np.bincount(self.labels(self._row_box(row)).ravel(), minlength=256)
        return [int(n) for n in counts[: len(self.classes) + 1]]

    def areas_mm2(self) -> dict[str, float]:
        """Square millimetres per class name."""
        counts, unit = self.pixel_counts(), self.grid.pixel_area_um2 / 1e6
        return {item.name: counts[value] * unit for value, item in self.classes.values()}

    def remove(self) -> None:
        """Delete the canvas from disk."""
        store.discard(self.path)
