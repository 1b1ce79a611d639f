"""Many slides: which ones, what their outputs are called, one failure not stopping the others.

Knows no slide formats and no networks; what is done with a slide is the caller's.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import struct
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wsiseg.errors import LeaseLostError, UsageError, WsisegError
from wsiseg.inference.lists import table, text_list
from wsiseg.names import is_dicom, plain, usable_stem

LISTS = (".txt", ".csv")
PICTURES = (".png", ".jpg", ".jpeg")
OWN_OUTPUTS = (".mask.ome.tif", ".overview.png")
FAILED, ELSEWHERE = "failed", "running elsewhere"
RESERVED = ("run", ".run")
"""Stems that are those of files of the run itself."""
_OF_LIBRARIES = (
    *(RuntimeError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError),
    *(AssertionError, EOFError, BufferError, SyntaxError, ImportError, struct.error, zlib.error),
)
"""What libraries that read files raise where the files are damaged."""
_PART = re.compile(r"\(\d+,\d+(,\d+)?\)$|[-_]?(map2?|macro)$", re.IGNORECASE)
"""What follows the name of a VMS or VMU slide in those of its parts."""


@dataclass(frozen=True)
class Task:
    """One slide to work on.

    Attributes:
        path: its file (or folder, for formats that are one).
        stem: flat name of its outputs, without suffix.
        mpp: micrometres per pixel stated for it in a table, or None.
        tissue: tissue mode or mask file stated for it in a table, or None.
    """

    path: Path
    stem: str = ""
    mpp: float | None = None
    tissue: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a slide.

    Attributes:
        task: the slide.
        status: "ok", "no tissue", `FAILED` or `ELSEWHERE`.
        seconds: that it took, None where that is not known.
        areas_mm2: square millimetres by class.
        error: why it failed, or where it is worked on, in one line.
        earlier: whether an earlier run or another process made the outputs.
    """

    task: Task
    status: str
    seconds: float | None = None
    areas_mm2: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    earlier: bool = False


def collect(inputs: Sequence[str], *, suffixes: Collection[str]) -> list[Task]:
    """The slides that the inputs name, each once, with the names of their outputs.

    An input is one of
    - a slide;
    - a folder, whose files with a known suffix are taken, and those of DICOM: not those in folders
      below it, no hidden ones and no pictures named like a slide;
    - a pattern with `*`, `?` or `[`;
    - a .txt list with a path a line; `#` at the start, or after a space where that is in no name
      of a file, begins a comment;
    - a .csv table with the column path and, if wanted, mpp and tissue.
    Outputs of earlier runs are left out, except where a list or table names them. Relative paths in
    a list or table are relative to its folder. A slide that stands in one, or that a link names,
    but is missing from the disk is kept, so that it fails by itself.

    Args:
        inputs: as given on the command line.
        suffixes: of slides, lower case, with the dot.

    Raises:
        UsageError: an input that is missing or names no slide, a list or table that is malformed, a
            slide of which different things are stated.
    """
    tasks: dict[Path, Task] = {}
    for text in inputs:
        try:
            found = _expand(text, suffixes)
        except OSError as e:
            raise UsageError(f"{text}: cannot be looked at ({e.strerror or e})") from e
        except RuntimeError as e:  # ~name of nobody
            raise UsageError(f"{text}: {e}") from e
        for task in found:
            place = Path(os.path.realpath(task.path))
            tasks[place] = _joined(tasks.get(place, task), task)
    if not tasks:
        raise UsageError(f"{inputs[0]}: no slide but an output of an earlier run; give the slide")
    return _with_stems(list(tasks.values()))


def _joined(first: Task, again: Task) -> Task:
    """A task with what is stated of its slide in another place, too."""
    stated: dict[str, Any] = {}
    for name in ("mpp", "tissue"):
        values = [v for v in (getattr(first, name), getattr(again, name)) if v is not None]
        if len(values) > 1 and values[0] != values[1]:
            raise UsageError(
                f"{again.path}: stands twice in lists, with {name} {values[0]} and {values[1]};"
                " leave one of them"
            )
        stated[name] = values[0] if values else None
    return replace(first, **stated)


def run_tasks(
    tasks: Iterable[Task], work: Callable[[Task], Outcome | None]
) -> Iterator[Outcome | None]:
    """Do the work on each task; gives what it gives, or how it failed.

    Only errors that can be a slide's or the machine's are caught; an interruption ends the run.
    """
    for task in tasks:
        began = time.monotonic()
        try:
            outcome = work(task)
        except LeaseLostError as e:
            outcome = Outcome(task, ELSEWHERE, error=str(e))
        except (WsisegError, OSError, MemoryError, *_OF_LIBRARIES) as e:
            outcome = Outcome(task, FAILED, time.monotonic() - began, error=_reason(task, e))
        yield outcome


def _reason(task: Task, error: BaseException) -> str:
    """Why a slide failed, in one line."""
    if isinstance(error, WsisegError):
        text = " ".join(str(error).split())
        return text if task.path.name in text or f"{task.stem}." in text else f"{task.path}: {text}"
    if isinstance(error, OSError):
        return f"{task.path}: {error.strerror or error}"
    if isinstance(error, MemoryError):
        return f"{task.path}: out of memory; try a lower --memory or --batch-size"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{task.path}: {type(error).__name__}: {first}"


def _expand(text: str, suffixes: Collection[str]) -> list[Task]:
    if not text:
        raise UsageError("an INPUT is empty, as of a variable that is not set; give a slide")
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path, suffixes)
    if path.suffix.lower() in LISTS and path.is_file():
        named = text_list(path) if path.suffix.lower() == ".txt" else table(path)
        return [Task(e.path, mpp=e.mpp, tissue=e.tissue) for e in named]
    if path.exists():
        if not path.name.lower().endswith(OWN_OUTPUTS):
            return [Task(path)]
        warnings.warn(f"{path}: left out, by its name an output of an earlier run", stacklevel=2)
        return []
    if not glob.has_magic(text):
        raise UsageError(f"{text}: no such file or folder")
    names = glob.glob(_pattern(path), recursive=True)  # noqa: PTH207 (Path.glob: relative ones only)
    found = sorted(Path(p) for p in names)
    files = [p for p in found if _is_file(p) and _is_slide(p, suffixes)]
    if not files:
        raise UsageError(f"{text}: no slide matches")
    return [Task(p) for p in files]


def _pattern(path: Path) -> str:
    """A pattern in which folders that are there, brackets and all, stand for themselves."""
    for folder in path.parents:
        if folder.is_dir():
            return str(Path(glob.escape(str(folder))) / path.relative_to(folder))
    return str(path)


def _is_file(path: Path) -> bool:
    """Whether a path is a file, or a link to nothing: a slide that is missing fails by itself."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _is_slide(path: Path, suffixes: Collection[str]) -> bool:
    name = path.name.lower()
    own = name.endswith(OWN_OUTPUTS)
    return path.suffix.lower() in suffixes and not name.startswith(".") and not own


def _folder(path: Path, suffixes: Collection[str]) -> list[Task]:
    try:
        there = [p for p in path.iterdir() if _is_file(p) and not p.name.startswith(".")]
    except OSError as e:
        raise UsageError(f"{path}: cannot list the folder ({e.strerror})") from e
    dicom = ".dcm" in suffixes
    files = sorted(p for p in there if _is_slide(p, suffixes) or (dicom and is_dicom(p)))
    files = _without_previews(files)
    if not files:
        known = " ".join(sorted(suffixes))
        raise UsageError(
            f"{path}: no slide in this folder; slides end in {known}; for those in folders below"
            f" it give a quoted pattern, '{path}/**/*.svs'"
        )
    return [Task(p) for p in files]


def _without_previews(files: list[Path]) -> list[Path]:
    """The files without pictures of a slide among them: of its name (a preview, a mask), or the
    parts of a Hamamatsu VMS or VMU slide, which begin with it; says so."""
    pictures = [p for p in files if p.suffix.lower() in PICTURES]
    slides = {p.stem.casefold(): p for p in files if p not in set(pictures)}
    parted = {stem: p for stem, p in slides.items() if p.suffix.lower() in (".vms", ".vmu")}
    left_out = {}
    for path in pictures:
        stem = path.stem.casefold()
        own = (p for s, p in parted.items() if stem.startswith(s) and _PART.match(stem[len(s) :]))
        of = slides.get(stem) or next(own, None)
        if of is not None:
            left_out[path] = of
    for path in sorted(left_out):
        warnings.warn(
            f"{path}: left out, by its name a picture of {left_out[path].name}; give its path to"
            " have it segmented",
            stacklevel=2,
        )
    return [p for p in files if p not in left_out]


def _with_stems(tasks: list[Task]) -> list[Task]:
    """Tasks with output names; where slides share one, or it is reserved, with a digest."""
    counts = Counter([*RESERVED, *RESERVED, *(_name(task.path) for task in tasks)])
    return [replace(t, stem=_unique_stem(t.path, counts)) for t in tasks]


def _unique_stem(path: Path, counts: Counter[str]) -> str:
    return usable_stem(_stem(path)) if counts[_name(path)] == 1 else _marked_stem(path)


def keep_stems(tasks: list[Task], earlier: Mapping[str, str]) -> list[Task]:
    """Tasks whose outputs are called as they were in earlier runs, whichever slides came with them.

    Args:
        tasks: as `collect` gives them.
        earlier: stem by path of the slide, as plain text; only a stem that `collect` could give to
            the slide counts.
    """
    if not earlier:
        return tasks
    kept = []
    for task in tasks:
        stem = earlier.get(plain(os.path.realpath(task.path)), task.stem)
        possible = stem in (usable_stem(_stem(task.path)), _marked_stem(task.path))
        kept.append(replace(task, stem=stem) if possible else task)
    alone = len({task.stem.casefold() for task in kept}) == len(kept)
    return kept if alone else tasks


def _marked_stem(path: Path) -> str:
    """The stem of a slide where it is not alone with its own: with a digest of its path."""
    digest = hashlib.sha256(
        Path(os.path.realpath(path)).as_posix().encode(errors="surrogateescape")
    ).hexdigest()
    return f"{usable_stem(_stem(path))}-{digest[:8]}"


def _name(path: Path) -> str:
    """What two slides must not share, as some file systems know no cases."""
    return usable_stem(_stem(path)).casefold()


def _stem(path: Path) -> str:
    name = path.name
    for suffix in (".ome.tif", ".ome.tiff", ".ome.btf"):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    if not path.stem.strip("."):  # nothing but dots before the last one
        return name.strip(".") or "slide"
    return path.stem
