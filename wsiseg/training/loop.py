"""One optimisation loop with warm-up, cosine decay, logs, checkpoints and exact resume.

Knows a task only through its losses. Every step's randomness comes from (seed, step), so a
resumed run is the run that was not interrupted.
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from wsiseg.atomic import staged
from wsiseg.config import to_mapping
from wsiseg.errors import CheckpointError, ConfigError, ModelError, UsageError
from wsiseg.training.files import append_row, cut_rows

_DAMAGE = (  # what reading a damaged state can raise
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


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

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loop.{name} {getattr(self, name)}: must be at least 1")
        for name in ("weight_decay", "warmup_steps", "clip_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loop.{name} {getattr(self, name)}: must not be negative")
        if not self.learning_rate > 0:
            raise ConfigError(f"loop.learning_rate {self.learning_rate}: must be above 0")


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

    A run that ended before its first line of log or state (a missing data folder, say) is none.

    Raises:
        UsageError: the folder holds a run and `resume` is off, or that of another configuration.
        OutputError: the folder cannot be written.
    """
    record, text = run / "config.json", json.dumps(to_mapping(config), indent=1)
    begun = any((run / name).exists() for name in ("log.csv", "state.pt"))
    if begun and not resume:
        raise UsageError(f"{run}: holds a run already; give --resume or another --out")
    if begun and (not record.exists() or record.read_text() != text):
        raise UsageError(f"{run}: was started with another configuration; use another --out")
    with staged(record) as (temporary,):
        temporary.write_text(text)


def learning_rate(config: LoopConfig, step: int) -> float:
    """Linear warm-up, then cosine from the peak to 1% of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def resume_step(path: Path) -> tuple[int, dict[str, Any] | None]:
    """(next step, state on the CPU) of what `run_loop` wrote; (0, None) where there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return 0, None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return int(state["step"]), state
    except _DAMAGE as e:
        raise CheckpointError(
            f"{path}: not a readable training state; remove the run and start again"
        ) from e


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

    Raises:
        ModelError: the loss is no longer finite.
        OutputError: log or state cannot be written.
    """
    optimiser = torch.optim.AdamW(
        task.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    first, saved = state
    if saved is not None:
        task.module.load_state_dict(saved["module"])
        optimiser.load_state_dict(saved["optimiser"])
    cut_rows(run / "log.csv", first)
    log = _Log(run / "log.csv")
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
        values = {k: float(v.detach()) for k, v in losses.items()}
        log.add(values)
        if not math.isfinite(values["loss"]):
            raise ModelError(f"the loss is not finite at step {step + 1}; lower the learning rate")
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            log.write(step + 1, config.steps, rate)
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            _save(run / "state.pt", task, optimiser, step + 1)


def _save(path: Path, task: Task, optimiser: torch.optim.Optimizer, step: int) -> None:
    state = {
        "step": step,
        "module": task.module.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    with staged(path, also=(RuntimeError,)) as (temporary,):  # torch.save: a full disk
        torch.save(state, temporary)


class _Log:
    """Means of the losses since the last line, to a CSV file and to standard output."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sums: dict[str, float] = {}
        self.count = 0
        self.since = time.monotonic()

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
