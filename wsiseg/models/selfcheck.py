"""What torch finds on this machine. Knows no models."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch

from wsiseg.errors import ModelError
from wsiseg.models.compat import ensure_torchvision_imports


class Accelerator(NamedTuple):
    """A device beside the CPU.

    Attributes:
        device: name for `--device`.
        name: what the maker calls it.
        memory: bytes in all, None where the device does not say.
        free: bytes that are free, None where the device does not say.
    """

    device: str
    name: str
    memory: int | None
    free: int | None


def accelerators() -> list[Accelerator]:
    """The devices that torch can compute on, beside the CPU."""
    found = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            found.append(Accelerator(f"cuda:{i}", torch.cuda.get_device_name(i), total, free))
    if torch.backends.mps.is_available():
        found.append(Accelerator("mps", "Apple GPU", None, None))
    return found


def built_for_cuda() -> bool:
    """Whether this torch could use an NVIDIA GPU if there were one."""
    return torch.version.cuda is not None


def torchvision_state() -> str:
    """ "absent", "fine", or "cured" where its compiled operators do not load; see compat.py.

    Raises:
        ModelError: torchvision cannot be imported for another reason.
    """
    if importlib.util.find_spec("torchvision") is None:
        return "absent"
    try:
        return "cured" if ensure_torchvision_imports() else "fine"
    except (RuntimeError, ImportError, OSError) as e:
        raise ModelError(f"torchvision cannot be imported ({' '.join(str(e).split())})") from e
