"""Tensors out of foreign torch files, without running what may hide in them. Knows no networks.

A torch checkpoint is a pickle, and opening one can run any code. Files are read with torch's
restricted unpickler, which only makes tensors and plain containers; unrestricted reading is an
explicit choice of the caller.
"""

from __future__ import annotations

import argparse
import pickle
import struct
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from wsiseg.errors import CheckpointError, MissingCheckpointError

_ZIP = b"PK\x03\x04"
_DAMAGE = (  # what unpickling cut or foreign bytes can raise
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,  # torch.load takes any file of that suffix for one
    struct.error,
)


class _Placeholder:
    """Stands for an object whose package is not installed; takes anything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """The unrestricted unpickler, with placeholders for classes of packages that are missing."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return super().find_class(module_name, global_name)
        except (ImportError, AttributeError):
            return _Placeholder


def read_torch(path: Path, *, allow_pickle: bool = False) -> Mapping[str, Any]:
    """The mapping in a torch file, tensors on the CPU, mapped from disk where the format allows.

    Args:
        path: a file of torch.save, of the zip or the older format.
        allow_pickle: read objects of any kind, which runs code that the file names.

    Raises:
        CheckpointError: the file is missing, truncated, no torch file, no mapping, or holds
            objects other than tensors and plain containers without `allow_pickle`.
    """
    start, size = _start(path)
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    is_zip = start.startswith(_ZIP)
    if not is_zip and start[:1] != b"\x80":
        raise CheckpointError(f"{path}: not a torch checkpoint (neither its zip nor a pickle)")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(
                path,
                map_location="cpu",
                mmap=is_zip,
                weights_only=not allow_pickle,
                pickle_module=_pickle_module() if allow_pickle else None,
            )
    except pickle.UnpicklingError as e:
        raise CheckpointError(_unpickling_message(path, str(e), allow_pickle)) from e
    except _DAMAGE as e:
        raise CheckpointError(
            f"{path}: damaged or truncated at {size} bytes ({_first_sentence(e)}); fetch it again"
        ) from e
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, not a mapping of tensors")
    return data


def tensors_of(data: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries of a mapping that are tensors."""
    return {str(k): v for k, v in data.items() if isinstance(v, Tensor)}


def _start(path: Path) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            return file.read(4), path.stat().st_size
    except FileNotFoundError as e:
        raise MissingCheckpointError(f"{path}: there is no such file") from e
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror or e})") from e


def _pickle_module() -> types.ModuleType:
    """A module like pickle whose unpickler does not need the packages of every object."""
    module = types.ModuleType("wsiseg_pickle")
    module.__dict__.update(pickle.__dict__)
    module.__dict__.update(__name__="wsiseg_pickle", Unpickler=_Unpickler)
    return module


def _unpickling_message(path: Path, text: str, allow_pickle: bool) -> str:
    if allow_pickle or "Unsupported operand" in text:
        return f"{path}: damaged, or not a file that torch.save wrote; fetch it again"
    return (
        f"{path}: holds objects other than tensors, and reading those can run any code; "
        "if you trust where the file comes from, add --allow-pickle"
    )


def _first_sentence(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0].partition(". ")[0]
    return text.rstrip(".") or type(error).__name__
