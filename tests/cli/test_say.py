"""Lines that nobody reads, and paths as they are typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from wsiseg.cli.say import PATH

PRINTS = """
import os, sys
from wsiseg.cli.say import say
os.close(1)
read, write = os.pipe()
os.close(read)
for k in range(3):
    say("to nobody")
say("to somebody", err=True)
sys.stderr.write("ends well")
"""


def test_a_closed_pipe_does_not_end_the_work() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "to somebody\nends well"


@click.command()
@click.argument("path", type=PATH)
def show(path: Path) -> None:
    """Print a path."""
    click.echo(str(path))


def test_home_is_found_where_the_shell_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/some/where")
    assert CliRunner().invoke(show, ["~/masks"]).output == "/some/where/masks\n"
    assert CliRunner().invoke(show, ["a/~b"]).output == "a/~b\n"
    result = CliRunner().invoke(show, ["~nobody-of-this-name/x"])
    assert result.exit_code == 2
    assert "~nobody-of-this-name/x" in result.output


def test_a_path_that_is_empty_is_not_this_folder() -> None:
    result = CliRunner().invoke(show, [""])
    assert result.exit_code == 2
    assert "is empty, as of a variable that is not set" in result.output
