"""What `wsiseg predict` does with all slides: order, locks, tables, exit code."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

from wsiseg import lease
from wsiseg.cli.cohort_progress import CohortProgress
from wsiseg.cli.predict_engine import check_engine, gather, is_shared
from wsiseg.cli.predict_known import first_files, stamps
from wsiseg.cli.predict_settings import IMAGE_SUFFIXES, SCANNER_SUFFIXES, Settings
from wsiseg.cli.predict_slides import Slides
from wsiseg.cli.predict_warnings import warn_of_options
from wsiseg.cli.say import say
from wsiseg.errors import OutputError, UsageError, WsisegError
from wsiseg.geometry import Grid, Size
from wsiseg.inference.cohort import (
    ELSEWHERE,
    FAILED,
    Outcome,
    Task,
    collect,
    keep_stems,
    run_tasks,
)
from wsiseg.inference.engine import resolve_precision
from wsiseg.inference.job import prepare
from wsiseg.inference.memory import memory_said
from wsiseg.inference.record import versions
from wsiseg.inference.runtime import to_openvino
from wsiseg.inference.slide_windows import for_slides
from wsiseg.models.checkpoint import load_model
from wsiseg.models.devices import is_broken, pick_device
from wsiseg.models.segmenter import Segmenter
from wsiseg.outputs.run_files import Row, RunFiles, check_folder, earlier_stems

Do = Callable[[list[Task], bool], Iterator[Outcome | None]]
"""Does slides; patiently or not, see `Slides.work`."""


def predict(settings: Settings) -> int:
    """Do what the command was asked; returns its exit code, 0 or 1.

    Raises:
        UsageError: the request cannot be; nothing was done.
        WsisegError: the model or the output folder cannot be used; nothing was done.
    """
    tasks = collect(settings.inputs, suffixes={*SCANNER_SUFFIXES, *IMAGE_SUFFIXES})
    settings.predict_options()
    if settings.tissue not in (None, "auto", "none") and not Path(settings.tissue).is_file():
        raise UsageError(
            f"--tissue {settings.tissue}: no such mask file; give an image, auto or none"
        )
    settings.output_options()
    if settings.mpp is not None and not 0.01 <= settings.mpp <= 1000:
        raise UsageError(f"--mpp {settings.mpp}: must be from 0.01 to 1000 um per pixel")
    check_engine(settings)
    warn_of_options(tasks, settings)
    if not settings.dry_run:
        _check_folder(settings.out)
        check_folder(settings.out)
    tasks = keep_stems(tasks, earlier_stems(settings.out))
    if settings.dry_run:
        outcomes, whole = list(_told(run_tasks(tasks, set_up(settings).dry))), True
    else:
        lease.sweep(settings.out)
        way = _shared if is_shared(settings) else _alone
        outcomes, whole = way(tasks, settings)
    failed = [o for o in outcomes if o.status == FAILED]
    _sum_up(tasks, failed)
    return 0 if whole and not failed else 1


def set_up(settings: Settings) -> Slides:
    """What does the slides in this process, with its model in memory.

    Raises:
        WsisegError: the model, the device or the settings cannot be.
    """
    options = settings.predict_options()
    slides = Slides(settings, _load(settings), options, lease.Locks(lease_s=lease.LEASE_S))
    with memory_said(slides.segmenter.device):
        prepare(Grid.at_mpp(Size(1, 1), 1.0, 1.0), slides.segmenter, options=options)
    return slides


def model_record(slides: Slides) -> dict[str, str]:
    """What is told of the model."""
    info = slides.segmenter.info
    return {"name": info.name, "sha256": info.sha256, "licence": info.licence}


def _alone(tasks: list[Task], settings: Settings) -> tuple[list[Outcome], bool]:
    """Do the slides in this process, one after the other."""
    slides = set_up(settings)
    slides.stamps = stamps(tasks, settings)
    table = _Table(settings, slides.locks)
    table.describe(model_record(slides))
    progress = CohortProgress(len(tasks))

    def do(some: list[Task], patient: bool) -> Iterator[Outcome | None]:
        for outcome in run_tasks(some, partial(slides.work, patient=patient)):
            yield outcome
            if len(tasks) > 1:  # one alone shows its own
                progress.tell()
            if outcome is None or outcome.status != FAILED:
                continue
            if is_broken(device := slides.segmenter.device):
                raise WsisegError(
                    f"{device}: fails at everything since {outcome.task.path}; start the same "
                    "command again, with --processes 1 if that slide does it once more: the "
                    "others are done then"
                )

    return _work(tasks, do, table, progress)


def _shared(tasks: list[Task], settings: Settings) -> tuple[list[Outcome], bool]:
    """Have the slides done by workers, several at a time."""
    from wsiseg.cli.crew import share_out
    from wsiseg.cli.crew_worker import Orders, absolute, absolute_task

    tasks = [absolute_task(task) for task in first_files(tasks, settings)]
    orders = Orders(absolute(settings), stamps(tasks, settings))
    table = _Table(settings, lease.Locks(lease_s=lease.LEASE_S))
    progress = CohortProgress(len(tasks))
    with closing(gather(orders, len(tasks))) as crew:

        def do(some: list[Task], patient: bool) -> Iterator[Outcome | None]:
            for report in share_out(crew, some, patient=patient, progress=progress):
                if report.model:
                    table.describe(report.model)
                yield report.outcome

        try:
            return _work(tasks, do, table, progress)
        finally:
            progress.end()


def _work(
    tasks: list[Task], do: Do, table: _Table, progress: CohortProgress
) -> tuple[list[Outcome], bool]:
    """Do the slides, first those that no other process has in hand, then look again at the rest.

    What becomes of each is written to the folder's table at once. Returns that, and whether the
    table tells of all of them.
    """
    waiting: list[Task] = []
    outcomes = []
    for outcome in _told(do(tasks, False), progress):
        if outcome.status == ELSEWHERE:
            waiting.append(outcome.task)
        else:
            outcomes.append(outcome)
            table.add(outcome)
    for outcome in _told(do(waiting, True), progress):
        outcomes.append(outcome)
        table.add(outcome)
        if outcome.status == ELSEWHERE:
            say(f"{outcome.task.stem}: {ELSEWHERE} ({outcome.error}), left to it")
    return outcomes, table.end()


def _told(
    outcomes: Iterator[Outcome | None], progress: CohortProgress | None = None
) -> Iterator[Outcome]:
    """The outcomes that there are; of failures a line is printed."""
    for outcome in outcomes:
        if outcome is None:
            if progress is not None:
                progress.drop()
            continue
        if outcome.status == FAILED:
            say(f"wsiseg: error: {outcome.error}", err=True)
        if progress is not None:
            progress.ended(outcome)
        yield outcome


class _Table:
    """The files about the run in the output folder; what cannot be written there ends nothing."""

    def __init__(self, settings: Settings, locks: lease.Locks) -> None:
        about = {"command": settings.as_record(), "versions": versions(settings.runtime)}
        lock = partial(locks.wait, settings.out / ".run.lock")
        self._files = RunFiles(settings.out, about=about, lock=lock)
        self._warned = ""

    def describe(self, model: Mapping[str, str]) -> None:
        """Say which model it is."""
        self._files.describe(model=dict(model))

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
        say(
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
                say(f"wsiseg: warning: {e}", err=True)
            self._warned = str(e)
            return False
        return True


def _load(settings: Settings) -> Segmenter:
    device = pick_device(settings.device)
    with memory_said(device):
        segmenter = for_slides(load_model(settings.model, device=settings.device))
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
    say(f"{len(failures)} of {len(tasks)} slides failed:", err=True)
    for failure in failures:
        say(f"  {failure.task.path}", err=True)
