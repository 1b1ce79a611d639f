"""Pictures of batches side by side. Knows no networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from wsiseg.atomic import staged


def save_grid(path: Path, rows: Sequence[Tensor], *, gap_px: int = 0, gap_after: int = 0) -> None:
    """Write rows of images of one size as one PNG.

    Args:
        path: the file.
        rows: (n, 3, H, W) images in [-1, 1], the same n in each.
        gap_px: white pixels between images.
        gap_after: with a gap: this many rows from the top are a block of its own, three gaps away
            from the rest; 0 = none.

    Raises:
        OutputError: the file cannot be written.
    """
    count, _, height, width = rows[0].shape
    tops = [
        i * (height + gap_px) + (2 * gap_px if gap_after and i >= gap_after else 0)
        for i in range(len(rows))
    ]
    sheet = torch.ones(3, tops[-1] + height, count * (width + gap_px) - gap_px)
    for top, row in zip(tops, rows, strict=True):
        for column, image in enumerate(row):
            left = column * (width + gap_px)
            sheet[:, top : top + height, left : left + width] = image.detach().float().cpu()
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    with staged(path) as (temporary,):
        Image.fromarray(pixels).save(temporary, format="PNG")
