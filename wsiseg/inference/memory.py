"""Batches in parts that fit the memory of a device, halved where they do not. Knows no networks."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from wsiseg.errors import DeviceMemoryError

T = TypeVar("T")
_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
"""What errors say where a library has no exception of its own for a lack of memory."""


class Parts:
    """How much a device computes at a time: as many as it is given, until its memory does not hold
    them; then half as many, from there on.

    Attributes:
        most: the most of each kind at a time, where all at once did not fit.
    """

    def __init__(self, device: torch.device, *, together: bool) -> None:
        """With `together` as many at a time as it is given, else one by one."""
        self._device, self._together = device, together
        self.most: dict[str, int] = {}

    def run(self, what: str, count: int, work: Callable[[int, int], T]) -> list[T]:
        """What `work(start, stop)` gives for consecutive parts of `count`, in order.

        The first halving is said, as a warning; `what` is what is counted.

        Raises:
            DeviceMemoryError: there is no memory for a single one.
        """
        results: list[T] = []
        done = 0
        while done < count:
            most = self.most.get(what, count) if self._together else 1
            stop = min(count, done + most)
            try:
                results.append(work(done, stop))
                done = stop
                continue
            except RuntimeError as e:
                if not lacks_memory(e):
                    raise
                if stop - done == 1:
                    raise no_memory(self._device) from e
            self._halve(what, stop - done)  # here, where no error holds tensors any more
        return results

    def _halve(self, what: str, size: int) -> None:
        if not self.most:
            warnings.warn(
                f"{self._device}: out of memory with {size} {what} at a time; going on with half"
                " as many, as often as it takes",
                stacklevel=1,
            )
        self.most[what] = size // 2
        gc.collect()
        if self._device.type != "cpu":
            torch.get_device_module(self._device).empty_cache()


@contextmanager
def memory_said(device: torch.device, *, advice: str = "") -> Iterator[None]:
    """Have a lack of memory in the block raised as what can be read.

    Args:
        device: where the block computes.
        advice: what takes less memory; empty: what `predict` has for it, which tells itself of
            the host's memory by slide.

    Raises:
        DeviceMemoryError: the device has no memory left.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if lacks_memory(e) and (advice or isinstance(e, RuntimeError)):
            raise no_memory(device, advice) from e
        raise


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def no_memory(device: torch.device, advice: str = "") -> DeviceMemoryError:
    """The error of a device whose memory does not do for the least that can be computed."""
    other = "--memory" if device.type == "cpu" else "--batch-size, or --device cpu"
    return DeviceMemoryError(
        f"{device}: out of memory; end what else uses it and start the same command again, or "
        + (advice or f"give a lower {other}")
    )
