"""The script that imports the polygons into QuPath. Knows no QuPath but its text."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from wsiseg.atomic import staged

NAME = "import_wsiseg.groovy"


def qupath_script() -> str:
    """The Groovy script, for QuPath 0.4 or newer."""
    return (files("wsiseg.outputs") / NAME).read_text(encoding="utf-8")


def write_qupath_script(path: str | Path) -> None:
    """Write the script to a file.

    Raises:
        OutputError: the file cannot be written.
    """
    with staged(Path(path)) as (temporary,):
        temporary.write_text(qupath_script(), encoding="utf-8")
