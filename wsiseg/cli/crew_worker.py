"""What one worker of a crew does: sets up once, then one slide after the other.

Knows nothing of how it was started or of how its words reach the user.
"""

from __future__ import annotations

import io
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from uuid import uuid4

from wsiseg import __version__
from wsiseg.cli import show_warning
from wsiseg.cli.crew import Job, Report, Running
from wsiseg.cli.predict_known import Series, Stamp
from wsiseg.cli.predict_run import model_record, set_up
from wsiseg.cli.predict_settings import Settings
from wsiseg.cli.predict_slides import Slides
from wsiseg.inference.cohort import FAILED, Task, run_tasks
from wsiseg.models.devices import is_broken

EVERY_S = 0.5
"""Progress is told at most so often."""
Tell = Callable[[Running], None]


@dataclass(frozen=True)
class Orders:
    """What all workers of a run are told.

    Attributes:
        settings: of the command, with absolute paths.
        stamps: of outputs that were there when the run began, by stem, if they are to be remade.
        version: of wsiseg.
        run: which run this is.
    """

    settings: Settings
    stamps: Mapping[str, Stamp | None]
    version: str = __version__
    run: str = field(default_factory=lambda: uuid4().hex)


def absolute(settings: Settings) -> Settings:
    """The settings with paths that mean the same in any folder."""
    model, tissue = Path(settings.model), settings.tissue
    return replace(
        settings,
        out=settings.out.absolute(),
        model=str(model.absolute()) if model.is_file() else settings.model,
        tissue=tissue if tissue in (None, "auto", "none") else str(Path(tissue).absolute()),
    )


def absolute_task(task: Task) -> Task:
    """The task with paths that mean the same in any folder."""
    tissue = task.tissue
    if tissue not in (None, "auto", "none"):
        tissue = str(Path(tissue).absolute())
    return replace(task, path=task.path.absolute(), tissue=tissue)


def ready(orders: Orders, *, device: str) -> Slides:
    """A worker with its model in memory.

    Raises:
        WsisegError: the model, the device or the settings cannot be.
    """
    slides = set_up(replace(orders.settings, device=device))
    slides.stamps = dict(orders.stamps)
    return slides


def do(slides: Slides, job: Job, tell: Tell) -> Report:
    """Do one slide.

    Args:
        slides: from `ready`.
        job: the slide.
        tell: is told of progress; what it raises ends the slide.

    Raises:
        SystemExit: the slide failed and so would all others in this process; it is lost.
    """
    said: list[tuple[bool, str]] = []
    slides.progress, slides.series = partial(_Share, tell), Series()
    tell(Running(job.task.stem, 0.0))
    with (
        redirect_stdout(_Said(said, False)),
        redirect_stderr(_Said(said, True)),
        warnings.catch_warnings(),
    ):
        warnings.showwarning = show_warning
        (outcome,) = run_tasks([job.task], partial(slides.work, patient=job.patient))
    assert outcome is not None  # as no series was met before
    if outcome.status == FAILED and is_broken(slides.segmenter.device):
        sys.exit(f"wsiseg: warning: {outcome.error}")
    return Report(outcome, tuple(said), model_record(slides))


class _Share:
    """Progress of one slide, told to the user's process; see `Progress`."""

    def __init__(self, tell: Tell, stem: str) -> None:
        self._tell, self._stem = tell, stem
        self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` units are done."""
        if time.monotonic() - self._told >= EVERY_S:
            self._told = time.monotonic()
            self._tell(Running(self._stem, done / max(1, total)))

    def close(self) -> None:
        """Nothing is shown here."""


class _Said(io.StringIO):
    """A stream that puts what is written into a list."""

    def __init__(self, said: list[tuple[bool, str]], is_error: bool) -> None:
        super().__init__()
        self._list, self._is_error = said, is_error

    def write(self, text: str, /) -> int:
        """See `io.StringIO`."""
        super().write("" + text)  # raises on what is no text
        if text:
            self._list.append((self._is_error, text))
        return len(text)
