"""Slides named in text files: lists and tables. Opens no slide."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import NamedTuple

from wsiseg.errors import UsageError

COLUMNS = ("path", "mpp", "tissue")
_MAX_LIST_BYTES = 64 << 20
"""Of a list or table: a hundred thousand paths take a tenth of it."""
_MAX_LINE = 20_000
"""Characters of a line of one; a path has at most 4096, and csv takes no cell over 131072."""


class Entry(NamedTuple):
    """What a list or table says of a slide.

    Attributes:
        path: its file.
        mpp: micrometres per pixel, or None.
        tissue: tissue mode or mask file, or None.
    """

    path: Path
    mpp: float | None = None
    tissue: str | None = None


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


def text_list(path: Path) -> list[Entry]:
    tasks = [Entry(_listed(path, row)) for line in _lines(path) if (row := _entry(path, line))]
    if not tasks:
        raise UsageError(f"{path}: the list names no slide")
    return tasks


def _entry(path: Path, line: str) -> str:
    """What a line of a list names: all of it if that is there, else what comes before a `#`."""
    text = line.strip()
    if not text.startswith("#") and _listed(path, text).exists():
        return text
    return re.sub(r"(^|\s)#.*", "", text).strip()


def _listed(path: Path, text: str) -> Path:
    """The file that a list or table names, relative to its own folder."""
    try:
        return path.parent / Path(text).expanduser()
    except RuntimeError:  # ~name of nobody
        return path.parent / text


def table(path: Path) -> list[Entry]:
    reader = csv.DictReader(_lines(path))
    try:
        return _rows(path, reader)
    except csv.Error as e:
        raise UsageError(f"{path}, line {reader.line_num}: not a table ({e})") from e


def _rows(path: Path, reader: csv.DictReader[str]) -> list[Entry]:
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
        if len(cells) == len(row) and not any(cells.values()):
            continue  # spreadsheets write empty rows as commas
        if len(cells) != len(row) or not cells["path"]:
            raise UsageError(f"{path}, line {reader.line_num}: not one cell a column")
        tissue = cells.get("tissue") or None
        if tissue is not None and tissue not in ("auto", "none"):
            tissue = str(_listed(path, tissue))
        mpp = _number(cells.get("mpp") or None, f"{path}, line {reader.line_num}")
        tasks.append(Entry(_listed(path, cells["path"]), mpp=mpp, tissue=tissue))
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
