"""The files of a canvas: its folder, made and removed whole, and its planes. Knows no labels.

A kill at any moment leaves under a canvas's name a whole canvas or nothing; what is being made or
removed lies beside it under hidden names, which the next one to make or remove it clears away.

A loss of power may cost what was written in the last seconds, as chunks are left to the system to
write (their checksums tell those that it did not), but not the canvas: what it states of itself is
on the disk at once.
"""

from __future__ import annotations

import json
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from wsiseg.atomic import sync_file, sync_folder, sync_tree
from wsiseg.errors import CanvasError

RECORD, META = "wsiseg", "zarr.json"
DAMAGES = (OSError, KeyError, ValueError, TypeError, IndexError, RuntimeError)
"""What reading a damaged canvas raises."""
_COMPRESSION = Zstd(level=1)
"""What `ZstdCodec(level=1)` does, without zarr around it."""


class Planes:
    """The arrays of a canvas by name, opened when they are first asked for."""

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self._path, self._group = path, group
        self._open: dict[str, Any] = {}

    def has(self, name: str) -> bool:
        """Whether there is such an array."""
        return name in self._group

    def read(self, name: str, where: Any) -> npt.NDArray[Any]:
        """A part of an array.

        Raises:
            CanvasError: there is none of that name, or what is asked for is damaged.
        """
        array = self._get(name)
        try:
            return np.asarray(array[where])
        except DAMAGES as e:
            raise CanvasError(
                f"{self._path}: {name} cannot be read ({line(e)}); run wsiseg predict again"
            ) from e

    def read_rows(self, name: str) -> npt.NDArray[Any]:
        """All of an array, row by row: zeros where it cannot be read.

        Raises:
            CanvasError: there is none of that name.
        """
        array = self._get(name)
        rows = np.zeros(array.shape, array.dtype)
        for index in range(len(rows)):
            with suppress(*DAMAGES):
                rows[index] = array[index]
        return rows

    def require(self, *names: str) -> None:
        """Make sure that there are arrays of these names.

        Raises:
            CanvasError: one is missing or damaged.
        """
        for name in names:
            try:
                self._get(name)
            except DAMAGES as e:
                raise CanvasError(f"{self._path}: {name} cannot be read ({line(e)})") from e

    def put(self, name: str, where: Any, values: npt.NDArray[Any]) -> None:
        """Write a part of an array.

        Raises:
            CanvasError: the disk does not take it.
        """
        array = self._get(name)
        try:
            array[where] = values
        except OSError as e:
            raise self._unwritable(e) from e

    def put_chunk(self, name: str, index: tuple[int, int], values: npt.NDArray[Any]) -> None:
        """Write a chunk at once: the file that zarr would write, in less time.

        Args:
            name: of an array of `fill`, or one like the labels.
            index: row and column of the chunk.
            values: the whole chunk, or what of it lies inside the array.

        Raises:
            CanvasError: the disk does not take it, or the canvas is gone.
        """
        array = self._get(name)
        chunk = np.zeros(array.chunks, array.dtype.newbyteorder("<"))
        chunk[: values.shape[0], : values.shape[1]] = values
        path = self._path.joinpath(name, "c", *map(str, index))
        try:
            if not chunk.any():  # zarr leaves chunks of the fill value out
                path.unlink(missing_ok=True)
                return
            for folder in (path.parent.parent, path.parent):  # none above: a canvas that is gone
                folder.mkdir(exist_ok=True)
            _put_file(path, _COMPRESSION.encode(chunk))
        except OSError as e:
            raise self._unwritable(e) from e

    def new(self, name: str, dtype: str) -> None:
        """An array of zeros like the labels."""
        like = self._get("labels")
        try:
            self._open[name] = self._group.create_array(
                name,
                shape=like.shape,
                chunks=like.chunks,
                dtype=dtype,
                fill_value=0,
                compressors=ZstdCodec(level=1),
            )
        except OSError as e:
            raise self._unwritable(e) from e

    def put_image(self, name: str, image: npt.NDArray[np.uint8]) -> None:
        """Write a whole small array."""
        try:
            array = self._group.create_array(
                name, shape=image.shape, chunks=image.shape, dtype="uint8", overwrite=True
            )
            array[...] = image
        except OSError as e:
            raise self._unwritable(e) from e
        self._open[name] = array

    def drop(self, name: str) -> None:
        """Remove an array, if it is there."""
        self._open.pop(name, None)
        discard(self._path / name)

    def update_meta(self, **entries: Any) -> None:
        """Change entries of what the canvas states of itself.

        Raises:
            CanvasError: the disk does not take it, or the canvas is gone or damaged.
        """
        path = self._path / META
        try:
            stated = json.loads(path.read_bytes())
            stated["attributes"][RECORD].update(entries)
            _put_file(path, json.dumps(stated, indent=2).encode(), durable=True)
        except OSError as e:
            raise self._unwritable(e) from e
        except DAMAGES as e:
            raise CanvasError(f"{path}: cannot be read ({line(e)}); predict again") from e

    def _get(self, name: str) -> Any:
        if name not in self._open:
            if name not in self._group:
                raise CanvasError(f"{self._path}: has no {name}")
            self._open[name] = self._group[name]
        return self._open[name]

    def _unwritable(self, error: OSError) -> CanvasError:
        return unwritable(self._path, error)


def unwritable(path: Path, error: OSError) -> CanvasError:
    """The error for a disk that does not take a canvas."""
    return CanvasError(
        f"{path}: cannot write ({error.strerror or error}); check free space and permissions, then"
        " start the same command again"
    )


def _put_file(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file that has its name when it is whole, and with `durable` on the disk.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        unfinished.write_bytes(data)
        if durable:
            sync_file(unfinished)
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def fill(folder: Path, meta: Mapping[str, Any], names: Sequence[str]) -> None:
    """Make a new empty canvas of what it states of itself and of planes of bytes.

    Zarr makes it in memory: on a full disk its threads would still be writing after the error.

    Raises:
        OSError: it cannot be written.
    """
    (width, height), side = meta["grid"]["size"], int(meta["chunk_px"])
    rows, columns = -(-height // side), -(-width // side)
    chunk = (min(side, height), min(side, width))
    made: dict[str, Any] = {}
    group = zarr.open_group(MemoryStore(made), mode="w")
    how: dict[str, Any] = {"fill_value": 0, "compressors": ZstdCodec(level=1)}
    for name in names:
        group.create_array(name, shape=(height, width), chunks=chunk, dtype="uint8", **how)
    group.create_array("done", shape=(rows, columns), chunks=(1, columns), dtype="uint32", **how)
    group.attrs[RECORD] = dict(meta)
    for name, data in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.to_bytes())


def replace_folder(path: Path, build: Callable[[Path], None]) -> None:
    """Have `build` fill a new folder, which then takes the place of `path`.

    Raises:
        OSError: it cannot be written.
    """
    new = path.with_name(f".{path.name}.new")
    if new.exists():
        shutil.rmtree(new)
    try:
        build(new)
        sync_tree(new)
        discard(path, keep_new=True)
        new.rename(path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def discard(path: Path, *, keep_new: bool = False) -> None:
    """Remove a folder, and what a kill left of its making (unless `keep_new`) and removal."""
    gone, new = (path.with_name(f".{path.name}.{end}") for end in ("gone", "new"))
    shutil.rmtree(gone, ignore_errors=True)
    if not keep_new:
        shutil.rmtree(new, ignore_errors=True)
    try:
        path.rename(gone)
    except FileNotFoundError:
        return
    except OSError:
        gone = path
    shutil.rmtree(gone, ignore_errors=True)


def sweep(path: Path) -> None:
    """Remove the unfinished files that a killed writer left in a canvas, where that can be done."""
    for file in path.rglob("*.partial"):
        with suppress(OSError):  # another user's: it does no harm
            file.unlink()


def checksum(planes: Iterable[npt.NDArray[np.uint8]]) -> int:
    """CRC-32 of a chunk's planes, 1 where that is 0: a number that is never 0."""
    value = 0
    for plane in planes:
        value = zlib.crc32(plane.tobytes(), value)
    return value or 1


def line(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split())
