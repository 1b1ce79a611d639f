"""Slides shared out to a crew of workers: lost ones again, bounded; texts and progress to the user.

Knows neither processes nor Ray, which are behind `Crew`, nor what is done with a slide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from wsiseg.cli.cohort_progress import CohortProgress
from wsiseg.cli.say import say
from wsiseg.inference.cohort import FAILED, Outcome, Task

TRIES = 3
"""How often a slide is begun whose worker is lost each time, and a worker that does not start."""


@dataclass(frozen=True)
class Job:
    """One slide for a worker.

    Attributes:
        task: the slide.
        patient: whether to wait until it is known if another process that has it still lives.
        tries: how often it was begun before.
    """

    task: Task
    patient: bool = False
    tries: int = 0


@dataclass(frozen=True)
class Running:
    """A worker is at a slide; `share` of it, from 0 to 1, is done."""

    stem: str
    share: float


@dataclass(frozen=True)
class Report:
    """A worker is done with a slide.

    Attributes:
        outcome: what became of it.
        said: what was said meanwhile: (whether on stderr, text).
        model: name, sha256 and licence of the worker's model; nothing where no worker came so far.
    """

    outcome: Outcome
    said: tuple[tuple[bool, str], ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lost:
    """The worker that had a slide is gone; `why` in words that follow "its worker"."""

    job: Job
    why: str


Event = Running | Report | Lost


class Crew(Protocol):
    """Workers that do slides."""

    def submit(self, job: Job) -> None:
        """Take a slide, to be done when a worker is free."""

    def events(self) -> Iterable[Event]:
        """What happened since the last call; waits for it, but not for long.

        Raises:
            WsisegError: the workers cannot start to work.
        """

    def close(self) -> None:
        """End all workers, as well those that are at work."""


def share_out(
    crew: Crew, tasks: Iterable[Task], *, patient: bool, progress: CohortProgress
) -> Iterator[Report]:
    """Have a crew do slides; gives a report of each, in the order in which they end.

    A slide whose worker was lost is done again by another, `TRIES` times at most.

    Args:
        crew: who does them.
        tasks: the slides.
        patient: see `Job`.
        progress: is told of what is at work; ended slides are the caller's to tell.

    Raises:
        WsisegError: the workers cannot start to work.
    """
    left = 0
    for task in tasks:
        crew.submit(Job(task, patient))
        left += 1
    progress.show()
    while left:
        for event in crew.events():
            if isinstance(event, Running):
                progress.running(event.stem, event.share)
                continue
            progress.clear()
            report = _again(crew, event, progress) if isinstance(event, Lost) else event
            if report is not None:
                for is_error, text in report.said:
                    say(text, err=is_error, nl=False)
                left -= 1
                yield report
        progress.show()


def _again(crew: Crew, lost: Lost, progress: CohortProgress) -> Report | None:
    """Submit a lost slide once more; after the last try, the report of its failure."""
    job = replace(lost.job, patient=True, tries=lost.job.tries + 1)
    path, stem = job.task.path, job.task.stem
    if job.tries < TRIES:
        progress.stopped(stem)
        text = f"{path}: its worker {lost.why}; begun again, try {job.tries + 1} of {TRIES}"
        say(f"wsiseg: warning: {text}", err=True)
        crew.submit(job)
        return None
    error = (
        f"{path}: its worker {lost.why}, {TRIES} times; what it said stands above; give it more "
        "memory, or fewer slides at a time, and the same command goes on with it"
    )
    return Report(Outcome(job.task, FAILED, error=error))
