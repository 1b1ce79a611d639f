"""What `wsiseg predict` does with all slides: order, locks, tables, exit code."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click

from wsiseg import lease
from wsiseg.cli.predict_settings import IMAGE_SUFFIXES, SCANNER_SUFFIXES, Settings
from wsiseg.cli.predict_slides import Slides
from wsiseg.errors import ModelError, OutputError, UsageError
from wsiseg.geometry import Grid, Size
from wsiseg.inference.cohort import ELSEWHERE, FAILED, Outcome, Task, collect, run_tasks
from wsiseg.inference.engine import resolve_precision
from wsiseg.inference.job import prepare
from wsiseg.inference.memory import memory_said
from wsiseg.inference.record import versions
from wsiseg.inference.runtime import to_openvino
from wsiseg.models.checkpoint import load_model
from wsiseg.models.devices import pick_device
from wsiseg.models.segmenter import Segmenter
from wsiseg.outputs.run_files import Row, RunFiles, check_folder


def predict(settings: Settings) -> int:
    """Do what the command was asked; returns its exit code, 0 or 1.

    Raises:
        UsageError: the request cannot be; nothing was done.
        WsisegError: the model or the output folder cannot be used; nothing was done.
    """
    tasks = collect(settings.inputs, suffixes={*SCANNER_SUFFIXES, *IMAGE_SUFFIXES})
    options = settings.predict_options()
    if settings.tissue not in (None, "auto", "none") and not Path(settings.tissue).is_file():
        raise UsageError(f"--tissue {settings.tissue}: no such mask file; or give auto or none")
    settings.output_options()
    if settings.mpp is not None and not 0.01 <= settings.mpp <= 1000:
        raise UsageError(f"--mpp {settings.mpp}: must be from 0.01 to 1000 um per pixel")
    if not settings.dry_run:
        _check_folder(settings.out)
        check_folder(settings.out)
        lease.sweep(settings.out)
    slides = Slides(settings, _load(settings), options, lease.Locks(lease_s=lease.LEASE_S))
    slides.note_outputs(tasks)
    prepare(Grid.at_mpp(Size(1, 1), 1.0, 1.0), slides.segmenter, options=options)
    if settings.dry_run:
        outcomes, whole = list(_told(run_tasks(tasks, slides.dry))), True
    else:
        outcomes, whole = _work(tasks, slides)
    failed = [o for o in outcomes if o.status == FAILED]
    _sum_up(tasks, failed)
    return 0 if whole and not failed else 1


def _work(tasks: list[Task], slides: Slides) -> tuple[list[Outcome], bool]:
    """Do the slides, first those that no other process has in hand, then look again at the rest.

    What becomes of each is written to the folder's table at once. Returns that, and whether the
    table tells of all of them.
    """
    table = _Table(slides)
    waiting: list[Task] = []
    outcomes = []
    for outcome in _told(run_tasks(tasks, partial(slides.work, patient=False))):
        if outcome.status == ELSEWHERE:
            waiting.append(outcome.task)
        else:
            outcomes.append(outcome)
            table.add(outcome)
    for outcome in _told(run_tasks(waiting, partial(slides.work, patient=True))):
        outcomes.append(outcome)
        table.add(outcome)
        if outcome.status == ELSEWHERE:
            click.echo(f"{outcome.task.stem}: {ELSEWHERE} ({outcome.error}), left to it")
    return outcomes, table.end()


def _told(outcomes: Iterator[Outcome | None]) -> Iterator[Outcome]:
    """The outcomes that there are; of failures a line is printed."""
    for outcome in outcomes:
        if outcome is not None:
            if outcome.status == FAILED:
                click.echo(f"wsiseg: error: {outcome.error}", err=True)
            yield outcome


class _Table:
    """The files about the run in the output folder; what cannot be written there ends nothing."""

    def __init__(self, slides: Slides) -> None:
        settings, info, locks = slides.settings, slides.segmenter.info, slides.locks
        about = {
            "command": settings.as_record(),
            "model": {"name": info.name, "sha256": info.sha256, "licence": info.licence},
            "versions": versions(settings.runtime),
        }
        lock = partial(locks.wait, settings.out / ".run.lock")
        self._files = RunFiles(settings.out, about=about, lock=lock)
        self._warned = ""

    def add(self, outcome: Outcome) -> None:
        """Put a slide in."""
        task = outcome.task
        row = Row(
            task.path,
            task.stem,
            outcome.status,
            outcome.seconds,
            outcome.areas_mm2,
            outcome.error,
            weak=outcome.earlier or outcome.status == ELSEWHERE,
        )
        self._try(partial(self._files.add, row))

    def end(self) -> bool:
        """Say that the run has ended; whether the files tell of all that was put in."""
        if self._try(self._files.end):
            return True
        click.echo(
            f"wsiseg: error: {self._files.summary}: does not tell of this run; make it writable and"
            " start the same command again, what is complete is kept",
            err=True,
        )
        return False

    def _try(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except OutputError as e:
            if str(e) != self._warned:
                click.echo(f"wsiseg: warning: {e}", err=True)
            self._warned = str(e)
            return False
        return True


def _load(settings: Settings) -> Segmenter:
    try:
        device = pick_device(settings.device)
    except ModelError as e:
        raise UsageError(str(e)) from e
    with memory_said(device):
        segmenter = load_model(settings.model, device=settings.device)
    if settings.runtime == "torch":
        return segmenter
    precision = resolve_precision(settings.precision, segmenter.device)
    return to_openvino(segmenter, precision=precision)


def _check_folder(folder: Path) -> None:
    """Make the folder and write to it, so that hours of work do not end at a closed door."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise OutputError(
            f"--out {folder}: cannot write there ({e.strerror or e}); choose another folder"
        ) from e


def _sum_up(tasks: list[Task], failures: list[Outcome]) -> None:
    if len(tasks) < 2 or not failures:
        return
    click.echo(f"{len(failures)} of {len(tasks)} slides failed:", err=True)
    for failure in failures:
        click.echo(f"  {failure.task.path}", err=True)
