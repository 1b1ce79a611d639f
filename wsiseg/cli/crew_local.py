"""A crew of processes on this machine, each with its device. Knows no slides.

Each process has a pipe of its own, so one that is killed in the middle of a message harms no other;
its end of the pipe closes with it, which is how its end is noticed. Processes are spawned, never
forked, as on all systems alike.
"""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

from wsiseg.cli.crew import TRIES, Event, Job, Lost, Report, Running
from wsiseg.cli.crew_worker import Orders, do, ready
from wsiseg.errors import DeviceMemoryError, WsisegError
from wsiseg.models.devices import limit_threads

READY = "ready"
WAIT_S = 1.0
END_S = 10.0
"""Workers that are asked to end have so long to do it."""


@dataclass
class _Worker:
    """A process, its end of the pipe and what it is at."""

    device: str
    process: SpawnProcess
    pipe: Connection[Any, Any]
    is_ready: bool = False
    job: Job | None = None
    lacked: DeviceMemoryError | None = None


class LocalCrew:
    """Processes on this machine; one that dies is replaced."""

    def __init__(self, orders: Orders, devices: list[str], *, threads: int | None) -> None:
        """Start a process for each of `devices`, with `threads` of torch each if it says so."""
        self._context = get_context("spawn")
        self._orders, self._threads = orders, threads
        self._waiting: deque[Job] = deque()
        self._failed_starts = 0
        self._workers: list[_Worker] = []
        try:
            for device in devices:
                self._workers.append(self._start(device))
        except BaseException:
            self.close()
            raise

    def submit(self, job: Job) -> None:
        """See `Crew`."""
        self._waiting.append(job)

    def events(self) -> Iterator[Event]:
        """See `Crew`."""
        for worker in self._workers:
            if worker.is_ready and worker.job is None and self._waiting:
                self._give(worker)
        pipes = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(pipes), timeout=WAIT_S):
            worker = pipes[pipe]  # type: ignore[index]
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                yield from self._replace(worker)
                continue
            if isinstance(message, DeviceMemoryError):
                worker.lacked = message  # it ends now; what took its memory may end, too
            elif isinstance(message, WsisegError):
                raise message
            if message == READY:
                worker.is_ready, self._failed_starts = True, 0
            if isinstance(message, Report):
                worker.job = None
            if isinstance(message, Report | Running):
                yield message

    def close(self) -> None:
        """See `Crew`. What is at work is asked to end, and killed if it does not."""
        for worker in self._workers:
            worker.pipe.close()  # an idle worker ends by that
            if worker.job is not None or not worker.is_ready:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(END_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()

    def _start(self, device: str) -> _Worker:
        pipes: tuple[Connection[Any, Any], ...] = ()
        try:
            here, there = pipes = self._context.Pipe()
            process = self._context.Process(
                target=serve, args=(there, self._orders, device, self._threads), daemon=True
            )
            process.start()
        except OSError as e:
            for pipe in pipes:
                pipe.close()
            raise WsisegError(
                f"cannot start a worker process ({e.strerror or e}); give fewer --processes"
            ) from e
        there.close()
        return _Worker(device, process, here)

    def _give(self, worker: _Worker) -> None:
        worker.job = self._waiting.popleft()
        with suppress(OSError):  # if it died, reading from it will tell
            worker.pipe.send(worker.job)

    def _replace(self, worker: _Worker) -> Iterator[Event]:
        """Start another process for one that died; its slide is lost."""
        worker.pipe.close()
        worker.process.join(END_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        why = how_ended(worker.process.exitcode)
        if not worker.is_ready:
            self._failed_starts += 1
            if self._failed_starts >= TRIES and worker.lacked is not None:
                raise worker.lacked
            if self._failed_starts >= TRIES:
                raise WsisegError(
                    f"a worker process on device {worker.device} {why} before it had the model in "
                    f"memory, {TRIES} times; give fewer --processes, or more memory"
                )
        self._workers[self._workers.index(worker)] = self._start(worker.device)
        if worker.job is not None:
            yield Lost(worker.job, why)


def how_ended(code: int | None) -> str:
    """How a process ended, in words, from its exit code."""
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        memory = " (often for lack of memory)" if name == "SIGKILL" else ""
        return f"was ended by {name}{memory}"
    return f"ended with exit code {code}"


def serve(pipe: Connection[Any, Any], orders: Orders, device: str, threads: int | None) -> None:
    """What a worker process does: set up, then jobs from the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the user's process, which ends all
    signal.signal(signal.SIGTERM, _end)
    try:
        if threads is not None:
            limit_threads(threads)
        slides = ready(orders, device=device)
    except WsisegError as e:
        pipe.send(e)
        return
    try:
        pipe.send(READY)
        while True:
            pipe.send(do(slides, pipe.recv(), pipe.send))
    except (EOFError, OSError):
        return  # the user's process is gone, or needs no more


def _end(number: int, frame: FrameType | None) -> None:
    """End with all that is open closed: canvas and lock."""
    sys.exit(128 + number)
