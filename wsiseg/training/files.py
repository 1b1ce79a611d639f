"""Files of a run: written whole or not at all, and rows of CSV files. Knows no networks."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from wsiseg.errors import OutputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` when the block ends well.

    Raises:
        OutputError: the folder or the file cannot be written (no space, no permission).
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError, RuntimeError) as e:  # torch.save: a full disk, RuntimeError
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())
        raise OutputError(
            f"{path}: cannot be written ({reason}); check free space and permissions"
        ) from e
    finally:
        with suppress(OSError):  # the error that led here says more
            temporary.unlink(missing_ok=True)


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
    with replacing(path) as temporary:
        temporary.write_text("".join([*lines[:1], *kept]))
