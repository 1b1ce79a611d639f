"""The files of a run: rows of CSV, TensorBoard events, lines to read, states. Knows no networks."""

from __future__ import annotations

import csv
import math
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wsiseg.atomic import staged
from wsiseg.errors import CheckpointError, OutputError
from wsiseg.training.eventlog import EventLog

_DAMAGE = (  # what reading a damaged state can raise
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Add a row to a CSV file, with a header if the file is new or empty.

    Of a file that is there the columns stay: what a row lacks is nan, what it has beside them is
    left out.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        names = list(row)
        new = not path.exists() or not path.stat().st_size
        if not new:
            with path.open(newline="") as file:
                names = next(csv.reader(file), names)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, names, restval="nan", extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerow(row)
    except OSError as e:
        raise OutputError(f"{path}: cannot be written ({e.strerror or e})") from e


def cut_rows(path: Path, step: int) -> None:
    """Remove the rows after a step, which a resumed run writes again, and torn ones."""
    if not path.exists():
        return
    with path.open(newline="") as file:  # as the csv module ended them
        lines = file.read().splitlines(keepends=True)
    whole = [r for r in lines if r.endswith("\n") and r.count(",") == lines[0].count(",")]
    kept = [
        r for r in whole[1:] if r.partition(",")[0].isdecimal() and int(r.split(",")[0]) <= step
    ]
    with staged(path) as (temporary,):
        temporary.write_text("".join([*whole[:1], *kept]), newline="")


class RunLog:
    """Means of the losses since the last line: to log.csv, TensorBoard and standard output."""

    def __init__(self, run: Path, first: int) -> None:
        """Go on with the tables of a run after `first` steps."""
        self.path, self.validated = run / "log.csv", run / "validation.csv"
        for path in (self.path, self.validated):
            cut_rows(path, first)
        self.events = EventLog(run, first_step=first + 1)
        self.sums: dict[str, float] = {}
        self.count = 0
        self.since = time.monotonic()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.events.close()

    def add(self, losses: Mapping[str, float]) -> None:
        """Count the losses of a step."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Write what was measured after a step, if anything was."""
        if values:
            row = {"step": step, **values}
            append_row(self.validated, row)
            self.events.scalars("validation", row)
            print("  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)

    def write(self, step: int, total: int, rate: float, *, most_s: float = math.inf) -> None:
        """Write the means of the losses since the last line; at most `most_s` seconds are left."""
        seconds = time.monotonic() - self.since
        means = {name: value / self.count for name, value in self.sums.items()}
        row = {"step": step, "learning_rate": rate, "seconds": seconds, **means}
        append_row(self.path, row)
        self.events.scalars("training", row)
        left = min(seconds / self.count * (total - step), most_s) / 60
        text = "  ".join(f"{k} {v:.4g}" for k, v in means.items())
        print(f"step {step}/{total}  {text}  {left:.0f} min left", flush=True)
        self.sums, self.count, self.since = {}, 0, time.monotonic()


def read_state(path: Path, advice: str) -> dict[str, Any]:
    """What `torch.save` wrote, on the CPU: the device that it was on may not be here.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except _DAMAGE as e:
        raise CheckpointError(f"{path}: not a readable training state; {advice}") from e


def resume_step(path: Path) -> tuple[int, dict[str, Any] | None]:
    """(next step, state on the CPU) of what `run_loop` wrote; (0, None) where there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return 0, None
    advice = "remove the run and start again"
    state = read_state(path, advice)
    try:
        return int(state["step"]), state
    except (LookupError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: not a training state; {advice}") from e
