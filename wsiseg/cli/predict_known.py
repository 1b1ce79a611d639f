"""What is known before the work: outputs that were there, files of DICOM slides. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wsiseg.cli.predict_settings import Settings
from wsiseg.cli.say import say
from wsiseg.errors import OutputError
from wsiseg.inference.cohort import Outcome, Task, run_tasks
from wsiseg.models.segmenter import ModelInfo
from wsiseg.names import is_dicom
from wsiseg.outputs.files import KINDS, complete_outputs, output_names
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
        say(f"{task.stem}: the same DICOM slide as {first.name}, skipped")
        return True


def first_files(tasks: Iterable[Task], settings: Settings) -> list[Task]:
    """The tasks without further files of DICOM slides, for those who do not see all of them."""
    series = Series()

    def look(task: Task) -> Outcome | None:
        if not is_dicom(task.path):
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


def complete(
    settings: Settings, info: ModelInfo, slide: Slide, task: Task
) -> dict[str, Any] | None:
    """The record of complete outputs of this slide, model and settings, if all kinds are there.

    Raises:
        OutputError: they, or those that are there, are of another slide, model or setting.
    """
    sidecar = complete_outputs(settings.out, task.stem)
    if sidecar is None:
        return None
    for what, (where, wanted) in _wanted(settings, info, slide, task).items():
        found = sidecar.get(where)
        for key, value in wanted.items():
            if not isinstance(found, dict) or found.get(key) != value:
                raise OutputError(
                    f"{settings.out / task.stem}.json: these are outputs of {what} ({key} differs);"
                    " choose another --out, or --overwrite them"
                )
    return sidecar if set(KINDS) <= set(sidecar["files"]) else None


def unlike(settings: Settings, sidecar: dict[str, Any], canvas: Path) -> str:
    """In words, what of complete outputs is not as it was asked for; empty if nothing is."""
    found = _other_polygons(settings, sidecar)
    parameters = sidecar.get("parameters")
    kept = parameters if isinstance(parameters, dict) else {}
    for name, wanted, own in (
        ("precision", settings.precision, kept.get("precision")),
        ("runtime", settings.runtime, kept.get("runtime", "torch")),
    ):
        if wanted not in ("auto", own):
            found += f"; made with --{name} {own}"
    if settings.keep_canvas and not canvas.exists():
        found += "; no canvas was kept, --overwrite --keep-canvas makes one"
    return found


def _other_polygons(settings: Settings, sidecar: dict[str, Any]) -> str:
    """In words, that the polygons of complete outputs have other settings; empty if not."""
    polygons = sidecar.get("polygons")
    found = polygons.get("options") if isinstance(polygons, dict) else None
    wanted = asdict(settings.output_options().polygons)
    if not isinstance(found, dict) or all(found.get(k) == v for k, v in wanted.items()):
        return ""
    return "; its polygons were made with other settings"


def _wanted(
    settings: Settings, info: ModelInfo, slide: Slide, task: Task
) -> dict[str, tuple[str, dict[str, Any]]]:
    """What outputs must state to be those of a run: where in their record, and what."""
    options = settings.predict_options()
    return {
        "another slide": ("slide", {"quickhash": slide.quickhash}),
        "another resolution": ("slide", {"mpp": slide.mpp}),
        "another frame (--coords)": ("slide", {"size": list(slide.size)}),
        "another model": ("model", {"sha256": info.sha256}),
        "other settings": (
            "parameters",
            {
                "window_px": info.window_px,
                "overlap_px": options.overlap_of(info.window_px),
                "seed": options.seed,
                "tta": options.tta,
                **settings.tissue_record(task),
            },
        ),
    }
