"""The processes that train one model together. Knows no tasks.

Started by `accelerate launch -m wsiseg.cli train ...`, each process computes its share of every
batch and the gradients are averaged, so the weights stay equal in all of them; the first one
writes. Without a launcher there is one process and nothing to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
from torch import Tensor, nn

from wsiseg.errors import UsageError

PATIENCE = timedelta(days=1)
"""How long the others wait while the first one validates or writes; ten minutes is NCCL's own."""


class Processes:
    """This process among those of the run.

    Attributes:
        index: 0 for the one that writes.
        count: how many there are.
    """

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
            self.index, self.count = state.process_index, state.num_processes

    @property
    def first(self) -> bool:
        """Whether this process writes files and lines."""
        return self.index == 0

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def end(self) -> None:
        """Leave the others when all have come here, so that none ends another's connection."""
        if self.count > 1:
            self.wait()
            torch.distributed.destroy_process_group()

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(reduce(parameter.grad, reduction="mean"))

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes, the same in all of them."""
        if self.count == 1:
            return value
        from accelerate.utils import reduce

        mean: Tensor = reduce(value, reduction="mean")
        return mean

    def value(self, own: float, device: torch.device) -> float:
        """The value of the first process."""
        if self.count == 1:
            return own
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor(own, device=device)).item())

    def agree(self, flag: bool, device: torch.device) -> bool:
        """What the first process says."""
        if self.count == 1:
            return flag
        from accelerate.utils import broadcast

        return bool(broadcast(torch.tensor(int(flag), device=device)).item())


def device_of_process(name: str) -> str:
    """The device of this process: with several of them each takes its own GPU.

    To be asked before `Processes`, which connects GPUs where there are any, and then no CPUs.

    Raises:
        UsageError: one GPU for several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return name
    if name.startswith("cuda:"):
        raise UsageError(
            f"device {name}: one GPU for several processes; give --device cuda, with which each "
            "takes its own (CUDA_VISIBLE_DEVICES says which there are)"
        )
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK')}"
    if name == "cpu":
        from accelerate import PartialState

        PartialState(cpu=True, timeout=PATIENCE)  # Processes finds it
    return name
