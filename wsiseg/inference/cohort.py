"""Many slides: which ones, what their outputs are called, one failure not stopping the others.

Knows no slide formats and no networks; what is done with a slide is the caller's.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import os
import re
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from wsiseg.errors import LeaseLostError, UsageError, WsisegError
from wsiseg.names import usable_stem

LISTS = (".txt", ".csv")
OWN_OUTPUTS = (".mask.ome.tif", ".overview.png")
COLUMNS = ("path", "mpp", "tissue")
FAILED, ELSEWHERE = "failed", "running elsewhere"
_MAX_LIST_BYTES = 64 << 20
"""Of a list or table: a hundred thousand paths take a tenth of it."""
_MAX_LINE = 20_000
"""Characters of a line of one; a path has at most 4096, and csv takes no cell over 131072."""
RESERVED = ("run", ".run")
"""Stems that are those of files of the run itself."""
_OF_LIBRARIES = (
    *(RuntimeError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError),
    *(AssertionError, EOFError, BufferError, SyntaxError, ImportError, struct.error, zlib.error),
)
"""What libraries that read files raise where the files are damaged."""


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
    - a folder, whose files with a known suffix are taken: not those in folders below it, no hidden
      ones and no outputs of earlier runs;
    - a pattern with `*`, `?` or `[`;
    - a .txt list with a path a line; `#` at the start or after a space begins a comment;
    - a .csv table with the column path and, if wanted, mpp and tissue.
    Relative paths in a list or table are relative to its folder. A slide that stands in one but is
    missing from the disk is kept, so that it fails by itself.

    Args:
        inputs: as given on the command line.
        suffixes: of slides, lower case, with the dot.

    Raises:
        UsageError: an input that is missing or names no slide, a list or table that is malformed.
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
            tasks.setdefault(Path(os.path.realpath(task.path)), task)
    return _with_stems(list(tasks.values()))


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
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path, suffixes)
    if path.suffix.lower() in LISTS and path.is_file():
        return _text_list(path) if path.suffix.lower() == ".txt" else _table(path)
    if path.exists():
        return [Task(path)]
    if not glob.has_magic(text):
        raise UsageError(f"{text}: no such file or folder")
    names = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob: relative ones only)
    found = sorted(Path(p) for p in names)
    files = [p for p in found if p.is_file() and _is_slide(p, suffixes)]
    if not files:
        raise UsageError(f"{text}: no slide matches")
    return [Task(p) for p in files]


def _is_slide(path: Path, suffixes: Collection[str]) -> bool:
    name = path.name.lower()
    own = name.endswith(OWN_OUTPUTS)
    return path.suffix.lower() in suffixes and not name.startswith(".") and not own


def _folder(path: Path, suffixes: Collection[str]) -> list[Task]:
    try:
        files = sorted(p for p in path.iterdir() if p.is_file() and _is_slide(p, suffixes))
    except OSError as e:
        raise UsageError(f"{path}: cannot list the folder ({e.strerror})") from e
    if not files:
        known = " ".join(sorted(suffixes))
        raise UsageError(
            f"{path}: no slide in this folder; slides end in {known}; for those in folders below"
            f" it give a quoted pattern, '{path}/**/*.svs'"
        )
    return [Task(p) for p in files]


def _lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_LIST_BYTES + 1)
        lines = data.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot read the list ({e})") from e
    if len(data) > _MAX_LIST_BYTES or any(len(s) > _MAX_LINE or "\0" in s for s in lines):
        raise UsageError(f"{path}: not a list of slides; give a text file with a path a line")
    return lines


def _text_list(path: Path) -> list[Task]:
    rows = (re.sub(r"(^|\s)#.*", "", line).strip() for line in _lines(path))
    tasks = [Task(path.parent / row) for row in rows if row]
    if not tasks:
        raise UsageError(f"{path}: the list names no slide")
    return tasks


def _table(path: Path) -> list[Task]:
    reader = csv.DictReader(_lines(path))
    try:
        return _rows(path, reader)
    except csv.Error as e:
        raise UsageError(f"{path}, line {reader.line_num}: not a table ({e})") from e


def _rows(path: Path, reader: csv.DictReader[str]) -> list[Task]:
    names = [(name or "").strip() for name in reader.fieldnames or ()]
    unknown = [name for name in names if name not in COLUMNS]
    if "path" not in names or unknown:
        found = ", ".join(map(repr, names)) or "nothing"
        raise UsageError(
            f"{path}: the first line must name the columns, path and if wanted mpp and tissue, with"
            f" commas between; it has {found}"
        )
    reader.fieldnames = names
    tasks = []
    for row in reader:
        cells = {k: (v or "").strip() for k, v in row.items() if isinstance(v, str | None)}
        if len(cells) != len(row) or not cells["path"]:
            raise UsageError(f"{path}, line {reader.line_num}: not one cell a column")
        tissue = cells.get("tissue") or None
        if tissue is not None and tissue not in ("auto", "none"):
            tissue = str(path.parent / tissue)
        mpp = _number(cells.get("mpp") or None, f"{path}, line {reader.line_num}")
        tasks.append(Task(path.parent / cells["path"], mpp=mpp, tissue=tissue))
    if not tasks:
        raise UsageError(f"{path}: the table names no slide")
    return tasks


def _number(text: str | None, where: str) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError as e:
        raise UsageError(f"{where}: mpp {text!r} is not a number") from e


def _with_stems(tasks: list[Task]) -> list[Task]:
    """Tasks with output names; where slides share one, or it is reserved, with a digest."""
    counts = Counter([*RESERVED, *RESERVED, *(_name(task.path) for task in tasks)])
    return [replace(t, stem=_unique_stem(t.path, counts)) for t in tasks]


def _unique_stem(path: Path, counts: Counter[str]) -> str:
    stem = usable_stem(_stem(path))
    if counts[stem.casefold()] == 1:
        return stem
    digest = hashlib.sha256(
        Path(os.path.realpath(path)).as_posix().encode(errors="surrogateescape")
    ).hexdigest()
    return f"{stem}-{digest[:8]}"


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
