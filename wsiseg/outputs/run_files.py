"""`summary.csv` and `run.json`: what became of each slide of a folder. Knows no pixels.

Both hold the slides of all runs on the folder: what was there is read again before each change, and
only rows that are new are put in. So several processes may write them in turn, under a lock.
"""

from __future__ import annotations

import csv
import io
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from wsiseg.atomic import staged
from wsiseg.errors import OutputError
from wsiseg.names import plain
from wsiseg.outputs.run_folder import SUMMARY

RUN = "run.json"
FORMAT = 1
RUNS_KEPT = 1000
"""How many runs `run.json` tells of: the last ones."""
FIRST, LAST = ("path", "stem", "status", "seconds"), ("error",)
AREA = "mm2_"
DONE = ("ok", "no tissue")
"""What is the status of slides whose outputs are there."""
Cells = dict[str, str]


@dataclass(frozen=True)
class Row:
    """One slide.

    Attributes:
        path: the slide.
        stem: name of its outputs without suffix.
        status: "ok", "no tissue", "failed" or "running elsewhere".
        seconds: that it took, None where that is not known.
        areas_mm2: square millimetres by class.
        error: why it is not ok, in one line.
        weak: whether a row of this slide that is there already tells more, if it has the same
            status or this one tells only that another process is at work.
    """

    path: Path
    stem: str
    status: str
    seconds: float | None = None
    areas_mm2: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    weak: bool = False

    def cells(self) -> Cells:
        """As in the table."""
        return {
            "path": plain(os.path.realpath(self.path)),
            "stem": plain(self.stem),
            "status": self.status,
            "seconds": "" if self.seconds is None else f"{self.seconds:.1f}",
            **{f"{AREA}{name}": f"{mm2:.6f}" for name, mm2 in self.areas_mm2.items()},
            "error": plain(" ".join(self.error.split())),
        }


class RunFiles:
    """The two files of a folder, as one run adds to them.

    Attributes:
        summary: the table.
    """

    def __init__(
        self,
        folder: Path,
        *,
        about: Mapping[str, Any],
        lock: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """A run that begins now.

        Args:
            folder: of the outputs.
            about: what is said of the run, ready for JSON: command, model, versions.
            lock: gives what keeps other processes from changing the files.
        """
        self.summary, self._folder, self._lock = folder / SUMMARY, folder, lock
        self._new: dict[str, Row] = {}
        self._statuses: dict[str, str] = {}
        self._began, self._clock = datetime.now(UTC), time.monotonic()
        self._run: dict[str, Any] = {
            "id": uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": self._began.isoformat(timespec="seconds"),
            "ended": None,
            **about,
        }

    def describe(self, **about: Any) -> None:
        """Say more of the run, ready for JSON; it is written with the next slide."""
        self._run.update(about)

    def add(self, row: Row) -> None:
        """Put a slide in. One that cannot be written now is written with the next.

        Raises:
            OutputError: the files cannot be written, or are not of wsiseg.
        """
        self._new[row.cells()["path"]] = row
        self._statuses[row.cells()["path"]] = row.status
        self._write()

    def end(self) -> None:
        """Say that the run has come to its end.

        Raises:
            OutputError: the files cannot be written, or are not of wsiseg.
        """
        spent = timedelta(seconds=time.monotonic() - self._clock)  # the clock may be set meanwhile
        self._run["ended"] = (self._began + spent).isoformat(timespec="seconds")
        self._write()

    def _write(self) -> None:
        self._run["counts"] = dict(Counter(self._statuses.values()))
        try:
            with self._lock():
                rows, runs = read_rows(self._folder), _read_runs(self._folder)
                for path, row in self._new.items():
                    rows[path] = _chosen(rows.get(path), row)
                runs = [*(r for r in runs if r.get("id") != self._run["id"]), self._run]
                ordered = sorted(rows.values(), key=lambda r: (r["stem"].casefold(), r["path"]))
                _store(self._folder, ordered, runs[-RUNS_KEPT:])
        except OSError as e:
            raise OutputError(f"{self.summary}: cannot write ({e.strerror or e})") from e
        self._new.clear()


def read_rows(folder: Path) -> dict[str, Cells]:
    """The rows of the table by the slide's path; none where it is missing.

    Raises:
        OutputError: it cannot be read, or is not of wsiseg.
    """
    path = folder / SUMMARY
    text = _read(path)
    try:
        reader = csv.DictReader(io.StringIO(text))
        if text.strip() and not {*FIRST, *LAST} <= set(reader.fieldnames or ()):
            raise _foreign(path)
        return {
            row["path"]: {k: v or "" for k, v in row.items() if isinstance(k, str)}
            for row in reader
            if row["path"] and row["stem"]
        }
    except csv.Error as e:
        raise _foreign(path) from e


def earlier_stems(folder: Path) -> dict[str, str]:
    """The stem that each slide of the table has, by its path; where several have one, that slide
    whose outputs are there, if it is one.

    Raises:
        OutputError: the table cannot be read, or is not of wsiseg.
    """
    slides: dict[str, list[Cells]] = {}
    for row in read_rows(folder).values():
        slides.setdefault(row["stem"].casefold(), []).append(row)
    found = {}
    for rows in slides.values():
        done = [row for row in rows if row["status"] in DONE] or rows
        if len(done) == 1:
            found[done[0]["path"]] = done[0]["stem"]
    return found


def check_folder(folder: Path) -> None:
    """Make sure that no other program's files have the names of those of the run.

    Raises:
        OutputError: they have.
    """
    read_rows(folder)
    _read_runs(folder)


def _read_runs(folder: Path) -> list[dict[str, Any]]:
    path = folder / RUN
    text = _read(path)
    if not text.strip():
        return []
    try:
        runs = json.loads(text)["runs"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise _foreign(path) from e
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise _foreign(path)
    return runs


def _read(path: Path) -> str:
    """The text of a file; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ""
    except OSError as e:
        raise OutputError(f"{path}: cannot read ({e.strerror or e})") from e
    except ValueError as e:
        raise _foreign(path) from e


def _foreign(path: Path) -> OutputError:
    return OutputError(
        f"{path}: was not written by wsiseg predict; move it away or choose another --out"
    )


def _chosen(old: Cells | None, new: Row) -> Cells:
    """The row to keep of one that is there and a new one."""
    if old is not None and new.weak and (new.error or old["status"] == new.status):
        return old
    return new.cells()


def _store(folder: Path, rows: list[Cells], runs: list[dict[str, Any]]) -> None:
    areas = list(dict.fromkeys(k for row in rows for k in row if k.startswith(AREA)))
    table = io.StringIO()
    writer = csv.DictWriter(
        table, (*FIRST, *areas, *LAST), restval="", extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    counts = dict(Counter(row["status"] for row in rows))
    data = {"format": FORMAT, "counts": counts, "runs": runs, "slides": [*map(_slide, rows)]}
    with staged(folder / SUMMARY, folder / RUN) as (csv_path, json_path):
        csv_path.write_text(table.getvalue(), encoding="utf-8", newline="")
        json_path.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")


def _slide(row: Cells) -> dict[str, Any]:
    """A row of the table for JSON."""
    areas = {k.removeprefix(AREA): _number(v) for k, v in row.items() if k.startswith(AREA)}
    return {
        "path": row["path"],
        "stem": row["stem"],
        "status": row["status"],
        "seconds": _number(row["seconds"]),
        "areas_mm2": {k: v for k, v in areas.items() if v is not None},
        "error": row["error"],
    }


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
