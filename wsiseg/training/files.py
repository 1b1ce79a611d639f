"""Rows of the CSV files of a run. Knows no networks."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from wsiseg.atomic import staged
from wsiseg.errors import OutputError


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Add a row to a CSV file, with a header if the file is new.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
    except OSError as e:
        raise OutputError(f"{path}: cannot be written ({e.strerror or e})") from e


def cut_rows(path: Path, step: int) -> None:
    """Remove the rows after a step, which a resumed run writes again."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [r for r in lines[1:] if r.partition(",")[0].isdigit() and int(r.split(",")[0]) <= step]
    with staged(path) as (temporary,):
        temporary.write_text("".join([*lines[:1], *kept]))
