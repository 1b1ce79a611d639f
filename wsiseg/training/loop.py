"""One optimisation loop with warm-up, cosine decay, logs, checkpoints and exact resume.

Knows a task only through its losses. Every step's randomness comes from (seed, step), so a
resumed run is the run that was not interrupted.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from wsiseg.config import to_mapping
from wsiseg.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class LoopConfig:
    """Configuration of the loop."""

    steps: int = 1000
    """Optimiser steps in all."""
    batch_size: int = 32
    """Crops a step."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    warmup_steps: int = 50
    """Steps of linear warm-up; cosine decay to 1% follows."""
    clip_norm: float = 1.0
    """Gradient norm limit; 0 = none."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast precision of the forward pass."""
    log_every: int = 20
    """Steps between two lines of the log."""
    save_every: int = 200
    """Steps between two checkpoints."""


class Task(Protocol):
    """What is trained."""

    @property
    def module(self) -> nn.Module:
        """Everything that a checkpoint must hold."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are optimised."""
        ...

    def losses(self, batch: Any, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Scalars to log; `loss` is minimised."""
        ...

    def after_step(self, step: int) -> None:
        """Called after the optimiser (moving averages)."""
        ...


def claim_run(run: Path, config: Any, *, resume: bool) -> None:
    """Make a run folder and keep its configuration in it; refuse to mix two runs.

    Raises:
        UsageError: the folder holds a run and `resume` is off, or that of another configuration.
    """
    record, text = run / "config.json", json.dumps(to_mapping(config), indent=1)
    if record.exists() and not resume:
        raise UsageError(f"{run}: holds a run already; give --resume or another --out")
    if record.exists() and record.read_text() != text:
        raise UsageError(f"{run}: was started with another configuration; use another --out")
    run.mkdir(parents=True, exist_ok=True)
    record.write_text(text)


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Add a row to a CSV file, with a header if the file is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def learning_rate(config: LoopConfig, step: int) -> float:
    """Linear warm-up, then cosine from the peak to 1% of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def resume_step(path: Path, *, device: str = "cpu") -> tuple[int, dict[str, Any] | None]:
    """(next step, state) of a checkpoint written by `run_loop`; (0, None) where there is none."""
    if not path.exists():
        return 0, None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        return int(state["step"]), state
    except (RuntimeError, KeyError, EOFError, OSError) as e:
        raise CheckpointError(f"{path}: not a readable training state; remove it ({e})") from e


def run_loop(
    task: Task,
    batches: Iterator[Any],
    config: LoopConfig,
    *,
    run: Path,
    seed: int,
    state: tuple[int, dict[str, Any] | None] = (0, None),
) -> None:
    """Optimise a task.

    Args:
        task: what is trained.
        batches: batches from the step of `state` on.
        config: the loop's configuration.
        run: folder for `log.csv` and `state.pt`.
        seed: seed of every step's generator.
        state: what `resume_step` gave.
    """
    optimiser = torch.optim.AdamW(
        task.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    first, saved = state
    if saved is not None:
        task.module.load_state_dict(saved["module"])
        optimiser.load_state_dict(saved["optimiser"])
    log = _Log(run / "log.csv", append=first > 0)
    device = next(task.module.parameters()).device.type
    for step in range(first, config.steps):
        rate = learning_rate(config, step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
            losses = task.losses(next(batches), step, generator)
        optimiser.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        if config.clip_norm:
            nn.utils.clip_grad_norm_(task.parameters(), config.clip_norm)
        optimiser.step()
        task.after_step(step)
        log.add({k: float(v.detach()) for k, v in losses.items()})
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            log.write(step + 1, config.steps, rate)
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            _save(run / "state.pt", task, optimiser, step + 1)


def _save(path: Path, task: Task, optimiser: torch.optim.Optimizer, step: int) -> None:
    temporary = path.with_suffix(".tmp")
    state = {
        "step": step,
        "module": task.module.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    torch.save(state, temporary)
    temporary.replace(path)


class _Log:
    """Means of the losses since the last line, to a CSV file and to standard output."""

    def __init__(self, path: Path, *, append: bool) -> None:
        self.path = path
        self.sums: dict[str, float] = {}
        self.count = 0
        self.since = time.monotonic()
        if not append:
            path.unlink(missing_ok=True)

    def add(self, losses: Mapping[str, float]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def write(self, step: int, total: int, rate: float) -> None:
        seconds = time.monotonic() - self.since
        means = {name: value / self.count for name, value in self.sums.items()}
        row = {"step": step, "learning_rate": rate, "seconds": seconds, **means}
        append_row(self.path, row)
        left = seconds / self.count * (total - step) / 60
        text = "  ".join(f"{k} {v:.4g}" for k, v in means.items())
        print(f"step {step}/{total}  {text}  {left:.0f} min left", flush=True)
        self.sums, self.count, self.since = {}, 0, time.monotonic()
