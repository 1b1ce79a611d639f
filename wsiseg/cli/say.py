"""What every command shares: lines to print, and paths as they are typed. Knows no algorithm."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click


class UserPath(click.Path):
    """A path whose `~` is the home folder, which shells leave alone in `--out=~/masks`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; a `~name` of nobody, or nothing, is a usage error."""
        if not os.fspath(value):
            self.fail("is empty, as of a variable that is not set; give a path", param, ctx)
        try:
            path = Path(os.fspath(value)).expanduser()
        except RuntimeError as e:
            self.fail(f"{value}: {e}", param, ctx)
        return super().convert(path, param, ctx)


PATH = UserPath()
THERE = UserPath(exists=True)
"""A file or folder that must be there."""
LESS_MEMORY = "give another --out and a smaller loop.batch_size with a larger loop.accumulate"
"""What takes less memory in training."""


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print a text. Where nobody reads any more (`| head`), the work goes on without it."""
    try:
        click.echo(text, err=err, nl=nl)
    except OSError:
        stream = sys.stderr if err else sys.stdout
        with suppress(OSError, ValueError):  # a stream without a file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
