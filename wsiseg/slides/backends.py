"""Chooses the library that reads a slide file. Knows no target resolution."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import tifffile

from wsiseg.errors import SlideError
from wsiseg.names import is_dicom
from wsiseg.slides.backend_base import TIFF_ERRORS, Backend, NotThisBackend
from wsiseg.slides.channels import channels_apart
from wsiseg.slides.direct_backend import DirectBackend
from wsiseg.slides.image_backend import ImageBackend
from wsiseg.slides.openslide_backend import OpenSlideBackend
from wsiseg.slides.tiff_check import check_tiff, is_tiff
from wsiseg.slides.tiffslide_backend import TiffSlideBackend

RGB = 3


def open_backend(path: Path, backend: str) -> Backend:
    """The backend that reads a file, see `_chosen`; three channels in planes of their own, which
    tiffslide puts together, are read by that.

    Raises:
        SlideError: nothing is there, or nothing that can be read; channels that are no RGB.
    """
    path = _slide_file(path)
    found = _chosen(path, backend)
    count = channels_apart(path, found.properties)
    if not count or (count == RGB and isinstance(found, TiffSlideBackend)):
        return found
    found.close()
    if count == RGB and backend == "auto":
        return TiffSlideBackend(path)
    raise SlideError(
        f"{path}: holds {count} channels in planes of their own, no RGB image as of a slide in"
        " brightfield; convert it to RGB"
    )


def _chosen(path: Path, backend: str) -> Backend:
    """The backend that reads a file.

    Args:
        path: the slide file, or a folder with one DICOM slide.
        backend: "openslide", "direct" or "tiffslide" for that one only; "auto" for OpenSlide, then
            tiffslide, then a plain image. "auto" prefers tiffslide where OpenSlide sees one level
            of a TIFF and tiffslide sees a pyramid (levels kept as SubIFDs), and direct to OpenSlide
            wherever it can read the slide.

    Raises:
        SlideError: nothing is there, or nothing that can be read.
    """
    if backend != "tiffslide":
        try:
            return _by_openslide(path, backend)
        except NotThisBackend:
            pass
    tiff = is_tiff(path)
    if tiff:
        check_tiff(path)
    if backend == "tiffslide" and tiff:
        return TiffSlideBackend(path)
    if backend != "auto":
        raise SlideError(f"{path}: {backend} does not read this format; try --backend auto")
    if tiff and _is_tiled(path):
        return TiffSlideBackend(path)
    try:
        return ImageBackend(path)
    except NotThisBackend as e:
        raise SlideError(
            f"{path}: not a slide or image that can be read; give SVS, NDPI, MIRAX, SCN, BIF, "
            "DICOM, TIFF, PNG or JPEG"
        ) from e


_HASHED_WHOLE, _SAMPLES, _SAMPLE_BYTES = 64 << 20, 128, 64 << 10


def file_digest(path: Path) -> str:
    """sha256, as hex, of a file's size and content; of one over 64 MiB, of `_SAMPLES` parts of it.

    The parts are of 64 KiB and lie evenly from the first byte to the last.
    """
    path = _slide_file(path)
    stat = path.stat()
    return _digest(path, stat.st_size, (stat.st_mtime_ns, stat.st_ino))


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, _: tuple[int, int]) -> str:
    """See `file_digest`; a file is read once as long as size, time and inode stay."""
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _HASHED_WHOLE:
            digest.update(file.read())
            return digest.hexdigest()
        for k in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * k // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _slide_file(path: Path) -> Path:
    """The file to open: `path` itself, or the first DICOM file of a folder."""
    try:
        if path.is_dir():
            return _dicom_file(path)
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as e:
        raise SlideError(f"{path}: no such file; check the path") from e
    except OSError as e:
        raise SlideError(f"{path}: cannot be read ({e.strerror}); check its permissions") from e
    except ValueError as e:
        raise SlideError(f"{path}: no name that a file can have ({e})") from e
    if empty:
        raise SlideError(f"{path}: the file is empty; copy it again")
    return path


def _dicom_file(folder: Path) -> Path:
    """A file of the only DICOM slide in a folder (a slide has a file for each level)."""
    slides: dict[str, Path] = {}
    for file in sorted(f for f in folder.iterdir() if is_dicom(f)):
        try:
            backend = OpenSlideBackend(file)
        except (NotThisBackend, SlideError):
            continue
        slides.setdefault(backend.properties["openslide.quickhash-1"], file)
        backend.close()
    if not slides:
        raise SlideError(f"{folder}: is a folder without a DICOM slide; give a slide file")
    if len(slides) > 1:
        raise SlideError(
            f"{folder}: holds {len(slides)} DICOM slides; give one of their files, such as "
            f"{next(iter(slides.values())).name}"
        )
    return next(iter(slides.values()))


def _by_openslide(path: Path, backend: str) -> Backend:
    """A file that OpenSlide opens, as "openslide", "direct" or "auto" want it read.

    Raises:
        NotThisBackend: OpenSlide does not open it, or "direct" cannot read it.
    """
    found = OpenSlideBackend(path)
    if backend == "openslide":
        return found
    if backend == "auto":
        best = _with_all_levels(path, found)
        if best is not found:
            return best
    try:
        return DirectBackend(path, found)
    except NotThisBackend:
        if backend == "auto":
            return found
        found.close()
        raise


def _with_all_levels(path: Path, backend: OpenSlideBackend) -> Backend:
    """The backend itself, or tiffslide where that sees a pyramid and OpenSlide one level."""
    if backend.vendor != "generic-tiff" or len(backend.level_sizes) > 1:
        return backend
    try:
        other = TiffSlideBackend(path)
    except (NotThisBackend, SlideError):
        return backend
    if len(other.level_sizes) > 1 and other.level_sizes[0] == backend.level_sizes[0]:
        backend.close()
        return other
    other.close()
    return backend


def _is_tiled(path: Path) -> bool:
    """Whether tifffile reads the TIFF and its first page is tiled."""
    try:
        with tifffile.TiffFile(path) as tiff:
            return bool(tiff.pages.first.is_tiled)
    except (tifffile.TiffFileError, *TIFF_ERRORS):
        return False
