"""Operations that pass over memory once where torch passes several times. Knows no networks.

On a CUDA device for which Triton compiles they run the kernels of `kernels.py`, otherwise torch's
own operations in float32. Either way they are computed in float32 and rounded once, to the type of
the input.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

WIDEST_HEAD = 256
"""Heads up to this width have kernels of torch's own that keep the scores on the chip."""
SCORES_BYTES = 1 << 30
"""Scores that are held at a time."""
_CANNOT = (RuntimeError, OSError, AssertionError, ImportError, subprocess.SubprocessError)
"""What Triton raises where it cannot compile."""
LONGEST = 16_384
"""Most keys whose scores a kernel of `softmax` takes in one row."""


@cache
def _there(device: torch.device) -> bool:
    """Whether Triton is installed and compiles a small kernel for a device."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        one = torch.ones(1, 1, 1, 1, device=device)
        importlib.import_module("wsiseg.models.kernels").add_bias(one, one, None)
    except torch.OutOfMemoryError:
        raise
    except _CANNOT as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        warnings.warn(
            f"{device}: Triton cannot compile ({reason}); going on with torch's own operations,"
            " which take longer. It needs a C compiler, and a folder that it may write to"
            " (TRITON_CACHE_DIR)",
            stacklevel=1,
        )
        return False
    return True


def kernels(x: Tensor) -> Any:
    """The module of kernels where it can run on that tensor, else None; they have no gradients."""
    if not x.is_cuda or torch.is_grad_enabled() or not _there(x.device):
        return None
    return importlib.import_module("wsiseg.models.kernels")


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) with the channels of a pixel side by side in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def group_norm(
    x: Tensor, norm: nn.GroupNorm, *, silu: bool = False, add: Tensor | None = None
) -> Tensor:
    """Group norm of x + add, then SiLU if asked for.

    Args:
        x: (B, C, H, W).
        norm: groups, epsilon, weight and bias (which it has).
        silu: whether x * sigmoid(x) follows.
        add: (1, C) or (B, C), added to every pixel first.
    """
    own = kernels(x)
    if own is not None:
        y: Tensor = own.group_norm(channels_last(x), norm, silu=silu, add=add)
        return y
    wide = x.float() if add is None else x.float() + add.float()[:, :, None, None]
    wide = nnf.group_norm(wide, norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)
    return (nnf.silu(wide) if silu else wide).to(x.dtype)


def add_bias(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a + b + bias of (B, C, H, W) maps and (C,) biases."""
    own = kernels(a)
    if own is not None:
        y: Tensor = own.add_bias(channels_last(a), channels_last(b), bias)
        return y
    wide = a.float() + b.float()
    return (wide if bias is None else wide + bias.float()[:, None, None]).to(a.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of one head.

    A wide head with many keys is two matrix products and a softmax between them, with the scores
    in float32, some tiles at a time: torch's own kernels for wide heads are slower than that.

    Args:
        q: (B, L, D).
        k: (B, M, D).
        v: (B, M, D).
    """
    keys, width = k.shape[1], q.shape[-1]
    own = kernels(q) if width > WIDEST_HEAD and 64 <= keys <= LONGEST else None
    if own is None or q.dtype == torch.float32 or not _wide_products():
        return nnf.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    at_a_time = max(1, SCORES_BYTES // (4 * q.shape[1] * keys))
    parts = []
    for start in range(0, len(q), at_a_time):
        part = slice(start, start + at_a_time)
        scores = torch.bmm(q[part], k[part].transpose(1, 2), out_dtype=torch.float32)
        parts.append(torch.bmm(own.softmax(scores, width**-0.5, v.dtype), v[part]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@cache
def _wide_products() -> bool:
    """Whether torch multiplies half precision into float32."""
    major, minor = (int(n) for n in torch.__version__.split(".")[:2])
    return (major, minor) >= (2, 8)


def spread(maps: Tensor, out: Tensor, *, tile_rows: int, tile_columns: int) -> None:
    """Add nine maps of every tile to `out`, upsampled bilinearly inside the tile and shifted.

    The map of kernel place (dy, dx) is added at pixels moved by (1 - dy, 1 - dx), zeros coming in
    at the border of the window. Only where there are `kernels`.

    Args:
        maps: (B * R * K, s, s, 9 * C) contiguous.
        out: (B, C, R * side, K * side) channels_last, changed in place.
        tile_rows: R.
        tile_columns: K.
    """
    kernels(out).spread(maps, out, tile_rows=tile_rows, tile_columns=tile_columns)
