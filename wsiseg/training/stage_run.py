"""One stage of the pretraining at work: its batches, measurements and file. Knows no networks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsiseg.training.files import resume_step
from wsiseg.training.loop import LoopConfig, Outcome, Task, run_loop
from wsiseg.training.pretrain_config import Stage
from wsiseg.training.pretrain_report import Measured, write_report
from wsiseg.training.processes import Processes
from wsiseg.training.tile_pool import UNREADABLE
from wsiseg.training.tiles import Pools

Report = Callable[[], Mapping[str, float]]
"""Measures, and gives the numbers."""
Write = Callable[[Path, Mapping[str, float]], None]
"""Writes the weights; a file with a card tells what was measured, so far as it was."""


@dataclass(frozen=True)
class StageRun:
    """A stage, its configuration and where it runs.

    Attributes:
        stage: its name.
        config: the configuration of all stages.
        pools: training and held-out images.
        part: the configuration of this stage.
        out: the run folder of all stages.
        device: where it computes.
    """

    stage: Stage
    config: Any
    pools: Pools
    part: Any
    out: Path
    device: torch.device

    @property
    def folder(self) -> Path:
        """The stage's own folder."""
        return self.out / self.stage

    @property
    def loop(self) -> LoopConfig:
        """How it is optimised."""
        loop: LoopConfig = self.part.loop
        return loop

    def train(self, task: Task, report: Report) -> bool:
        """All steps of a task, from where its state stands, with the report every now and then.

        Returns:
            Whether there was any step left to do.
        """
        task.module.to(self.device)
        state, processes = resume_step(self.folder / "state.pt"), Processes()
        batches = self.pools.training.batches(
            self.part.crop_px,
            self.loop.batch_size,
            seed=self.config.seed,
            start=state[0] * self.loop.accumulate,
            scale=self.config.scale,
            share=(processes.index, processes.count),
        )
        watched = _Watched(task, self, report)
        with closing(batches):  # type: ignore[type-var]
            run_loop(
                watched, batches, self.loop, run=self.folder, seed=self.config.seed, state=state
            )
        return state[0] < self.loop.steps

    def measured(self, size_px: int) -> Measured:
        """Crops to measure on."""
        return Measured(self.pools, size_px, self.config.seed, self.device)

    def report(self, report: Report) -> dict[str, float]:
        """What was measured at the end, written and printed; empty where no image can be read."""
        values = self.measure(report)
        if values:
            write_report(self.folder, values)
        return values

    def measure(self, report: Report) -> dict[str, float]:
        """What a report says; a warning and nothing where no image that it needs can be read."""
        try:
            return dict(report())
        except UNREADABLE as e:
            text = f"{self.stage}: could not be measured ({e}); its weights are kept all the same"
            warnings.warn(text, stacklevel=2)
            return {}

    def finish(self, task: Task, report: Report, name: str, write: Write) -> Path:
        """Train, write the file of a name, then measure; the first process does the last two.

        A file of a stage that was complete before is left as it is: later stages know it by its
        bytes, and statistics in it are not the same to the last bit on another machine. That of the
        last stage is written once more, with what was measured in its card.
        """
        path, processes = self.out / name, Processes()
        trained = self.train(task, report)
        if processes.first:
            if trained or not path.exists():
                write(path, {})
            values = self.report(report)
            if values and self.stage == self.config.stages[-1]:  # its file has a card
                write(path, values)
        processes.wait()
        return path


class _Watched:
    """A task that is measured every `measure_every` steps; not at the end, where it is anyway."""

    def __init__(self, task: Task, run: StageRun, report: Report) -> None:
        self._task, self._run, self._report = task, run, report
        self._first = Processes().first

    @property
    def module(self) -> nn.Module:
        return self._task.module

    def parameters(self) -> list[nn.Parameter]:
        return self._task.parameters()

    def losses(self, batch: Any, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        return self._task.losses(batch, step, generator)

    def after_step(self, step: int, gone: float) -> Outcome | None:
        outcome = self._task.after_step(step, gone)
        every, done = self._run.config.measure_every, step + 1
        last = gone == 1 or done == self._run.loop.steps
        if not self._first or not every or last or done % every:
            return outcome
        return Outcome(self._run.measure(self._report))
