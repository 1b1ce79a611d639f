"""Tensors of a file into a module that has none yet. Knows no configuration and no formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wsiseg.errors import CheckpointError


def fill(path: Path, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of those of a module without memory.

    Args:
        path: where they are from, for messages.
        module: on the meta device.
        tensors: by name, of the shapes of the module's.

    Raises:
        CheckpointError: tensors of another kind or that are not finite, a place without one.
    """
    for name, place in module.state_dict().items():
        tensor = tensors[name]
        if tensor.is_floating_point() != place.is_floating_point() or tensor.is_complex():
            raise CheckpointError(f"{path}: tensor {name} is {tensor.dtype}, not {place.dtype}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: tensor {name} is not finite; fetch the file again")
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as e:
        raise CheckpointError(f"{path}: {' '.join(str(e).split())}") from e
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(f"{path}: tensor {name} is not stored in checkpoints")
