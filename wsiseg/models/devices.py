"""The device to compute on. Knows no models."""

from __future__ import annotations

import torch

from wsiseg.errors import UsageError


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        UsageError: the device is unknown or not there.
    """
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise UsageError(f"device {name!r}: use auto, cpu, cuda, cuda:N or mps") from e
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": mps,
    }
    if not there.get(device.type, False):
        raise UsageError(f"device {name}: not there; use --device auto or cpu")
    return device


def cuda_count() -> int:
    """How many CUDA GPUs there are."""
    return torch.cuda.device_count()


def is_broken(device: torch.device) -> bool:
    """Whether a device computes nothing more in this process, as a GPU does after some errors."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def limit_threads(count: int) -> None:
    """Compute with so many threads of the CPU from now on."""
    torch.set_num_threads(count)
