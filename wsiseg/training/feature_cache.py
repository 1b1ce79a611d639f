"""Features of patches on disk, so that a frozen extractor computes each one once.

One safetensors file a patch, half precision. Disk bound: what does not fit below the limit, or
would take the last of the disk, is not kept, and is computed each time. Knows no networks.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from wsiseg.atomic import staged
from wsiseg.errors import OutputError
from wsiseg.models.base import Features

SPARE_BYTES = 10**9
"""What is left free of the disk, for the states and models of the run."""


class FeatureCache:
    """The features kept in one folder, which belongs to one extractor and one run's patches."""

    def __init__(self, folder: Path, *, limit_bytes: int, processes: int) -> None:
        """Features below `folder`, made if missing; so many processes share what they may take.

        Raises:
            OutputError: the folder cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"{folder}: cannot be made ({e.strerror or e})") from e
        held = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        self.folder, self._room = folder, (limit_bytes - held) // processes

    def get(self, number: int) -> Features | None:
        """The features of a patch, (R, K, channels, h, w) float16 each, or None."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError):  # damaged: computed again
            return None
        return tuple(tensors[str(i)] for i in range(len(tensors)))

    def put(self, number: int, features: Features) -> None:
        """Keep the features of a patch, if there is room.

        Raises:
            OutputError: they cannot be written.
        """
        size = sum(f.numel() * 2 for f in features)
        if size > min(self._room, self._spare()):
            return
        tensors = {str(i): f.to("cpu", torch.float16).contiguous() for i, f in enumerate(features)}
        with staged(self._path(number), also=(SafetensorError,), durable=False) as (temporary,):
            save_file(tensors, temporary)
        self._room -= size

    def _spare(self) -> int:
        """What the disk has room for, 0 where that cannot be told."""
        try:
            return shutil.disk_usage(self.folder).free - SPARE_BYTES
        except OSError:
            return 0

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"
