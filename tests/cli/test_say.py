"""Lines that nobody reads, and paths as they are typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from PIL import Image

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


@pytest.mark.parametrize(
    ("encoding", "name", "shown"),
    [
        ("utf-8", b"caf\xe9.png", b"caf\\udce9.png"),
        ("cp1252", "日本.png".encode(), b"\\u65e5\\u672c.png"),
    ],
)
def test_a_name_that_cannot_be_printed_is_shown_in_escapes(
    encoding: str, name: bytes, shown: bytes, tmp_path: Path
) -> None:
    path = tmp_path / os.fsdecode(name)
    Image.new("RGB", (60, 40), "white").save(path)
    words = [sys.executable, "-m", "wsiseg.cli", "info", str(path), "--mpp", "0.5"]
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    done = subprocess.run(words, capture_output=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout.splitlines()[0]


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
