"""Worker processes that cannot work."""

import os
from typing import Any

from wsiseg.errors import CheckpointError


def dies(*args: Any) -> None:
    """Die before anything can be done, as one that is killed."""
    os.kill(os.getpid(), 9)


def refuses(pipe: Any, *args: Any) -> None:
    """Say that there is no such model."""
    pipe.send(CheckpointError("no such model"))
