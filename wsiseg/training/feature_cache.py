"""Features of patches on disk, so that a frozen extractor computes each one once.

One safetensors file a patch, half precision. Disk bound: what does not fit below the limit is
not kept, and is computed each time. Knows no networks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from wsiseg.atomic import staged
from wsiseg.errors import OutputError
from wsiseg.models.base import Features


class FeatureCache:
    """The features kept in one folder, which belongs to one extractor and one run's patches."""

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        """Features below `folder`, made if missing.

        Raises:
            OutputError: the folder cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"{folder}: cannot be made ({e.strerror or e})") from e
        self.folder, self._limit = folder, limit_bytes
        self.bytes = sum(p.stat().st_size for p in folder.glob("*.safetensors"))

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
            OutputError: the disk is full.
        """
        size = sum(f.numel() * 2 for f in features)
        if self.bytes + size > self._limit:
            return
        tensors = {str(i): f.to("cpu", torch.float16).contiguous() for i, f in enumerate(features)}
        with staged(self._path(number), also=(SafetensorError,), durable=False) as (temporary,):
            save_file(tensors, temporary)
        self.bytes += size

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"
