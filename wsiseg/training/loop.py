"""One optimisation loop with warm-up, cosine decay, logs, checkpoints and exact resume.

Knows a task only through its losses. Every step's randomness comes from (seed, step), so a
resumed run is the run that was not interrupted, unless its schedule goes by the clock.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from wsiseg.atomic import staged
from wsiseg.errors import ConfigError, ModelError, WsisegError
from wsiseg.training.clock import Clock
from wsiseg.training.curves import draw_curves
from wsiseg.training.files import RunLog
from wsiseg.training.processes import Processes

_OTHER_STREAM = 0x5DEECE66


@dataclass(frozen=True)
class LoopConfig:
    """Configuration of the loop."""

    steps: int = 1000
    """Optimiser steps in all."""
    minutes: float = 0.0
    """Time after which the run ends, whatever `steps` says; the decay then goes by the share of
    the time that is gone, where that is more than the share of the steps. 0 = no limit."""
    batch_size: int = 32
    """Crops a step."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW; 0 makes it Adam."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's moving averages."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine decay to 1% of the peak, or the peak all the time."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one step."""
    clip_norm: float = 1.0
    """Gradient norm limit; 0 = none."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast precision of the forward pass."""
    log_every: int = 20
    """Steps between two lines of the log."""
    save_every: int = 200
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loop.{name} {getattr(self, name)}: must be at least 1")
        for name in ("minutes", "weight_decay", "warmup_steps", "clip_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loop.{name} {getattr(self, name)}: must not be negative")
        if not self.learning_rate > 0:
            raise ConfigError(f"loop.learning_rate {self.learning_rate}: must be above 0")
        if not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"loop.betas {list(self.betas)}: must be from 0 to below 1")


class Outcome(NamedTuple):
    """What a task found out after a step.

    Attributes:
        measured: values on validation images, for validation.csv; may be empty.
        stop: whether the run ends here.
    """

    measured: Mapping[str, float]
    stop: bool = False


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

    def after_step(self, step: int, gone: float) -> Outcome | None:
        """Called after the optimiser: moving averages, validation, an early end.

        `gone` is the share of the run's time, 0 without a limit; at 1 the step is the last one.
        """
        ...


@runtime_checkable
class Rated(Protocol):
    """A task whose parameters do not all learn at the same rate."""

    def rates(self) -> list[float]:
        """Learning rates of the parameters, one each, against the loop's."""
        ...


def learning_rate(config: LoopConfig, step: int, gone: float = 0.0) -> float:
    """Linear warm-up, then the peak, or cosine from the peak to 1% of it; `gone` is the share of
    the time that is gone, where there is a limit."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    span = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, max(gone, (step - config.warmup_steps) / span))
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


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
        batches: batches from the step of `state` on, `config.accumulate` a step; of several
            processes each is given its own share.
        config: the loop's configuration.
        run: folder for `log.csv`, `validation.csv`, `curves.png`, `tensorboard/` and `state.pt`,
            which the first process writes.
        seed: seed of every step's generator.
        state: what `resume_step` gave.

    Raises:
        ModelError: the loss is no longer finite.
        OutputError: log or state cannot be written.
    """
    optimiser = torch.optim.AdamW(
        _groups(task),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    first, saved = state
    if saved is not None:
        task.module.load_state_dict(saved["module"])
        optimiser.load_state_dict(saved["optimiser"])
        for group, own in zip(optimiser.param_groups, _groups(task), strict=True):
            group["rate"] = own["rate"]  # states of older versions lack it
    processes = Processes()
    device = next(task.module.parameters()).device
    clock = Clock(config.minutes, saved.get("seconds", 0.0) if saved else 0.0)
    gone = clock.share(processes, device)
    with RunLog(run, first) if processes.first else nullcontext() as log:
        for step in range(first, config.steps):
            rate = learning_rate(config, step, gone)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["rate"]
            values = _gradients(task, batches, config, step, (seed, processes.index))
            processes.average_gradients(task.parameters())
            norm = nn.utils.clip_grad_norm_(task.parameters(), config.clip_norm or math.inf)
            _check_finite(float(norm), "gradient", step)
            optimiser.step()
            gone = clock.share(processes, device)
            outcome = task.after_step(step, gone) or Outcome({})
            early = processes.agree(outcome.stop or gone == 1, device)
            last = early or step + 1 == config.steps
            if log is not None:
                log.add(values)
                log.validation(step + 1, outcome.measured)
                if last or (step + 1) % config.log_every == 0:
                    log.write(step + 1, config.steps, rate, most_s=clock.left_s)
                if last or (step + 1) % config.save_every == 0:  # ended early: complete
                    done = config.steps if early else step + 1
                    _save(run / "state.pt", task, optimiser, done, clock.spent_s)
                    if last or step + 1 >= config.log_every:  # something was logged
                        _draw(run)
            if early:
                break
    processes.wait()


def _draw(run: Path) -> None:
    """Draw the curves of a run, which goes on without them."""
    try:
        draw_curves(run)
    except WsisegError as e:
        warnings.warn(f"no curves are drawn: {e}", stacklevel=2)


def _groups(task: Task) -> list[dict[str, Any]]:
    """The parameters by their learning rate, in the order of the rates' first use."""
    parameters = task.parameters()
    rates = task.rates() if isinstance(task, Rated) else [1.0] * len(parameters)
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, rate in zip(parameters, rates, strict=True):
        groups.setdefault(rate, []).append(parameter)
    return [{"params": found, "rate": rate} for rate, found in groups.items()]


def _gradients(
    task: Task, batches: Iterator[Any], config: LoopConfig, step: int, seeds: tuple[int, int]
) -> dict[str, float]:
    """Fill the gradients of one step; the mean losses of its batches.

    Raises:
        ModelError: the loss is no longer finite.
    """
    seed, process = seeds
    # Of 64 bits, which any seed's product is kept in, the CPU's generator takes 32.
    own = (seed * 1_000_003 + step + process * 2_000_000_011) % 2**63
    generator = torch.Generator().manual_seed(own)
    torch.manual_seed(own ^ _OTHER_STREAM)  # dropout and what else draws from the global generator
    device = next(task.module.parameters()).device.type
    values: dict[str, float] = {}
    for parameter in task.parameters():
        parameter.grad = None
    for _ in range(config.accumulate):
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
            losses = task.losses(next(batches), step, generator)
        for name, value in losses.items():
            values[name] = values.get(name, 0.0) + float(value.detach()) / config.accumulate
        _check_finite(values["loss"], "loss", step)
        (losses["loss"] / config.accumulate).backward()  # type: ignore[no-untyped-call]
    return values


def _check_finite(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise ModelError(
            f"the {what} is not finite at step {step + 1}; try a lower loop.learning_rate, more "
            "loop.warmup_steps or loop.precision=fp32, in another --out"
        )


def _save(
    path: Path, task: Task, optimiser: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    state = {
        "step": step,
        "seconds": seconds,
        "module": task.module.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    with staged(path, also=(RuntimeError,)) as (temporary,):  # torch.save: a full disk
        torch.save(state, temporary)
