"""What is known before the work: outputs that were there, files of DICOM slides. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from wsiseg.cli.predict_settings import Settings
from wsiseg.inference.cohort import Outcome, Task, run_tasks
from wsiseg.outputs.files import output_names
from wsiseg.slides.slide import Slide

Stamp = tuple[int, ...]
"""What tells a file from one made later under its name."""


class Series:
    """DICOM slides that were met; each has many files, and any of them opens all of it."""

    def __init__(self) -> None:
        self._first: dict[str, Path] = {}

    def is_known(self, slide: Slide, task: Task) -> bool:
        """Whether another file of the same slide was met before; says so."""
        series = slide.properties.get("dicom.SeriesInstanceUID")
        if series is None:
            return False
        first = self._first.setdefault(series, task.path)
        if first == task.path:
            return False
        click.echo(f"{task.stem}: the same DICOM slide as {first.name}, skipped")
        return True


def first_files(tasks: Iterable[Task], settings: Settings) -> list[Task]:
    """The tasks without further files of DICOM slides, for those who do not see all of them."""
    series = Series()

    def look(task: Task) -> Outcome | None:
        if not _is_dicom(task.path):
            return Outcome(task, "")
        with settings.open(task) as slide:
            return None if series.is_known(slide, task) else Outcome(task, "")

    return [outcome.task for outcome in run_tasks(tasks, look) if outcome is not None]


def stamps(tasks: Iterable[Task], settings: Settings) -> dict[str, Stamp | None]:
    """Which outputs are older than this run, where all are to be made again; by stem."""
    return {t.stem: stamp(settings.out, t) for t in tasks} if settings.overwrite else {}


def stamp(out: Path, task: Task) -> Stamp | None:
    """The stamp of the outputs of a slide; None where there are none."""
    return file_stamp(out / output_names(task.stem)["json"])


def file_stamp(path: Path) -> Stamp | None:
    """The stamp of a file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return len(file.read(128)) == 128 and file.read(4) == b"DICM"
    except OSError:
        return False
