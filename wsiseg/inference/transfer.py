"""Tensors from a device to the host without waiting for it. Knows no networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def on_its_way(values: Tensor) -> tuple[Tensor, Any]:
    """The values on the CPU, and an event after which they are there, or None if they are already.

    Only a CUDA device is not waited for.
    """
    if not values.is_cuda:
        return values.cpu(), None
    here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    here.copy_(values, non_blocking=True)
    event: Any = torch.cuda.Event
    ready = event()
    ready.record(torch.cuda.current_stream(values.device))
    return here, ready
