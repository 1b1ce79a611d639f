"""What an input of the fuzzer is, and how a command is run on one. Knows no kind of input."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from wsiseg.cli import main
from wsiseg.errors import WsisegError

LONGEST = 2500
"""Characters that a message may have."""
OUT = "out"
"""The only folder that a case may write to."""


_EXPECTED = re.compile(r"wsiseg: |  |[0-9]+ of [0-9]+ (slides )?failed")
"""Lines on stderr: errors and warnings, and at the end the slides that failed."""


class Case(NamedTuple):
    """One input.

    Attributes:
        what: how it was made, for reports.
        run: does with it what a command does; raises what the command would.
    """

    what: str
    run: Callable[[], None]


class Offence(AssertionError):  # noqa: N818
    """An input was neither taken nor refused as it should be."""


def check_message(text: str) -> None:
    """Make sure that an error is one line that can be read."""
    if not text or "\n" in text or len(text) > LONGEST or text.endswith("."):
        raise Offence(f"not one clear line: {text[:300]!r} ({len(text)} characters)")


def check_refusal(error: WsisegError) -> None:
    """Make sure that a refusal is one line with an exit code of its own."""
    check_message(str(error))
    if error.exit_code not in (1, 2):
        raise Offence(f"exit code {error.exit_code}")


def command(*arguments: object) -> int:
    """Run `wsiseg` in this process; its exit code, after looking at what it says.

    Raises:
        Offence: a traceback, another exit code than 0, 1 and 2, an error without its one line.
    """
    out, err = io.StringIO(), io.StringIO()
    argv = ["wsiseg", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    said = err.getvalue()
    if code not in (0, 1, 2) or "Traceback" in said + out.getvalue():
        raise Offence(f"{argv}: ended with {code}: {said[-2000:]}")
    if code and not said.startswith("Usage:"):
        errors = [s for s in said.splitlines() if s.startswith("wsiseg: error: ")]
        stray = [s for s in said.splitlines() if not _EXPECTED.match(s)]
        if not errors or stray:
            raise Offence(f"{argv}: {len(errors)} lines of error, and others: {said[-2000:]}")
        for line in errors:
            check_message(line)
    return int(code)


def files_below(folder: Path) -> dict[str, int]:
    """Size of every file below a folder, without those in its folder for outputs."""
    return {
        str(p.relative_to(folder)): p.lstat().st_size
        for p in folder.rglob("*")
        if not p.is_dir() and p.relative_to(folder).parts[0] != OUT
    }
