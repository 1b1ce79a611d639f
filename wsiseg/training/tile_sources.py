"""Sources of unlabelled tissue: what a configuration names, and which of it can be used.

Knows no crops and no networks, and does not divide files.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from wsiseg.errors import ConfigError, DatasetError, ResolutionError, SlideError, WsisegError
from wsiseg.names import as_written
from wsiseg.slides.resolution import checked_mpp
from wsiseg.training.tile_files import ImageCache, TissueFile, open_file
from wsiseg.training.tile_slides import OpenSlides


@dataclass(frozen=True)
class SourceConfig:
    """One source of unlabelled tissue."""

    path: str
    """Glob below the data folder, of images or slides."""
    mpp: float | None = None
    """Micrometres per pixel of the images; None: unknown, used as they are (slides: their own)."""
    weight: float = 1.0
    """Share of the crops that come from this source, against the other sources' weights."""
    exclude: str = ""
    """Glob of file names to leave out (annotations, test images)."""
    group: str = ""
    """Regular expression in the file name; files in which it finds the same are held out together
    (its first bracket, if it has one). Empty: each file by itself."""
    label: str = ""
    """Class of all files of the source, for measuring the encoder only; empty: none."""

    def __post_init__(self) -> None:
        if not self.path or Path(self.path).is_absolute():
            raise ConfigError(f"source path {self.path!r}: must be relative to the data folder")
        if not self.weight > 0:
            raise ConfigError(f"source {self.path}: weight must be above 0")
        try:
            checked_mpp(1.0 if self.mpp is None else self.mpp)
            re.compile(self.group)
        except ResolutionError as e:
            raise ConfigError(f"source {self.path}: {e}") from e
        except re.error as e:
            raise ConfigError(f"source {self.path}: group is not a regular expression ({e})") from e

    def group_of(self, path: Path) -> str:
        """The group of a file; its name where the expression finds nothing."""
        found = re.search(self.group, path.name) if self.group else None
        if found is None:
            return path.name
        return str(found.group(1) if found.re.groups else found.group(0))


class Found(NamedTuple):
    """The files of all sources that can be used.

    Attributes:
        sources: the sources.
        files: of each source its files, at least one, in the order of their names.
        slides: the open ones among them; to be closed.
    """

    sources: Sequence[SourceConfig]
    files: list[list[TissueFile]]
    slides: OpenSlides


def find_files(
    sources: Sequence[SourceConfig],
    root: Path,
    *,
    mpp: float,
    memory_gb: float = 4.0,
    kept: Path | None = None,
) -> Found:
    """Find the files of all sources, and the tissue of their slides.

    Files that cannot be used are warned of and left out.

    Args:
        sources: what to read.
        root: folder that their paths are relative to.
        mpp: micrometres per pixel to bring images of known resolution to.
        memory_gb: bound on the decoded images that are held, in 10^9 bytes.
        kept: folder in which is kept where the tissue of slides lies, so that only new slides are
            searched; None: all are. Processes and runs may share it.

    Raises:
        DatasetError: a source matches no file, or none that can be used.
    """
    cache, slides = ImageCache(round(memory_gb * 1e9)), OpenSlides()
    known: dict[tuple[Path, float | None], TissueFile | str] = {}

    def open_(path: Path, own_mpp: float | None) -> TissueFile:
        return open_file(path, own_mpp, mpp, cache, slides, kept)

    try:
        files = [_usable(source, _paths(source, root), known, open_) for source in sources]
    except WsisegError:
        slides.close()
        raise
    return Found(sources, files, slides)


def _usable(
    source: SourceConfig,
    paths: Sequence[Path],
    files: dict[tuple[Path, float | None], TissueFile | str],
    open_: Callable[[Path, float | None], TissueFile],
) -> list[TissueFile]:
    """The files of a source that can be used; those that cannot are warned of when they are met
    first. `files` gets all that are opened, or what is wrong with them.

    Raises:
        DatasetError: none can be used.
    """
    new = [path for path in paths if (path, source.mpp) not in files]
    for path in new:
        try:
            files[path, source.mpp] = open_(path, source.mpp)
        except (SlideError, DatasetError) as e:
            files[path, source.mpp] = _why(e)
    found = [files[path, source.mpp] for path in paths]
    usable = [f for f in found if not isinstance(f, str)]
    if not usable:
        raise DatasetError(
            f"source {source.path}: none of its {len(found)} files can be used; {found[0]}"
        )
    for path in new:
        if isinstance(why := files[path, source.mpp], str):
            warnings.warn(
                f"{why}; it is left out; exclude of source {source.path} silences this",
                stacklevel=2,
            )
    return usable


def _why(error: WsisegError) -> str:
    """What is wrong with a file, and what its source can do; no options of other commands."""
    first, *advice = str(error).split("; ")
    text = "; ".join([first, *(a for a in advice if "--" not in a)])
    if isinstance(error, ResolutionError):
        text += "; set mpp of its source (of a separate one where other slides differ)"
    return text


def _paths(source: SourceConfig, root: Path) -> list[Path]:
    """The files that a source names, in the order of their names.

    Raises:
        ConfigError: its path is no pattern.
        DatasetError: it names no file.
    """
    try:
        base, pattern = as_written(root, source.path)
        found = sorted(base.glob(pattern)) or sorted(root.glob(source.path))
    except (ValueError, NotImplementedError) as e:
        raise ConfigError(f"source path {source.path!r}: not a pattern of files ({e})") from e
    files = [p for p in found if p.is_file()]
    if found and not files:
        raise DatasetError(
            f"{root / source.path}: names folders only; {source.path.rstrip('/')}/* names what "
            "lies in them"
        )
    paths = [p for p in files if not (source.exclude and p.match(source.exclude))]
    if not paths:
        raise DatasetError(f"{root / source.path}: no such images; check the data folder and path")
    return paths
