"""Worker processes that cannot work."""

import os
from typing import Any

from wsiseg.errors import CheckpointError, DeviceMemoryError


def dies(*args: Any) -> None:
    """Die before anything can be done, as one that is killed."""
    os.kill(os.getpid(), 9)


def refuses(pipe: Any, *args: Any) -> None:
    """Say that there is no such model."""
    pipe.send(CheckpointError("no such model"))


def lacks_memory(pipe: Any, *args: Any) -> None:
    """Say that the model does not fit."""
    pipe.send(DeviceMemoryError("cuda:0: out of memory"))


def lacks_memory_at_first(pipe: Any, met: Any, *args: Any) -> None:
    """The same for the first worker that does not find the file `met`; others do a slide."""
    if not met.exists():
        met.touch()
        lacks_memory(pipe)
        return
    from wsiseg.cli.crew import Report  # here, as the others are to end at once
    from wsiseg.inference.cohort import Outcome

    pipe.send("ready")
    pipe.send(Report(Outcome(pipe.recv().task, "ok")))
