"""Finds the slide that a result was made of, and no other. Knows no pages and no tiles."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from wsiseg.errors import SlideError
from wsiseg.outputs.run_folder import SlideResult
from wsiseg.slides import Slide, open_slide

READERS = ("openslide", "direct", "tiffslide")
"""Backends that a record may name."""


def find_slide(
    result: SlideResult, folders: Sequence[Path], *, nearby: Sequence[Path] = ()
) -> Slide:
    """Open the slide of a result.

    A file of its name is looked for in `folders` and all folders below them, then in `nearby`
    themselves. It is taken only if it is the slide that was analysed: same digest, same size.

    Raises:
        SlideError: no such file is there, or only other slides of that name, or it cannot be read.
    """
    name = result.slide
    if not name or Path(name).name != name or "\0" in name:
        raise SlideError("the record does not name the slide")
    if not result.quickhash or result.size is None:
        raise SlideError("no record tells what was analysed; run wsiseg predict again")
    problem = ""
    for path in _candidates(name, folders, nearby):
        try:
            return _open(path, result)
        except SlideError as e:
            problem = str(e)
    if problem:
        raise SlideError(problem)
    raise SlideError(f"{name} was not found; name its folder with --slides")


def _candidates(name: str, folders: Sequence[Path], nearby: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        seen: set[str] = set()  # links may lead round
        for place, below, files in os.walk(folder, followlinks=True):
            if (real := os.path.realpath(place)) in seen:
                below.clear()
                continue
            seen.add(real)
            below.sort()
            if name in files or name in below:
                yield Path(place) / name
    for folder in nearby:
        with suppress(OSError):  # a name that no file can have
            if (folder / name).exists():
                yield folder / name


def _open(path: Path, result: SlideResult) -> Slide:
    """The slide at a path, if it is that of the result."""
    slide = open_slide(
        path,
        backend=result.backend if result.backend in READERS else "auto",
        mpp=result.mpp,
        crop_to_bounds=result.frame == "qupath",
    )
    if slide.quickhash != result.quickhash or tuple(slide.size) != result.size:
        slide.close()
        raise SlideError(f"{path} is another slide of that name; name the right folder by --slides")
    return slide
