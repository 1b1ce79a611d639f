"""Triton kernels for activations in channels_last order. Knows no networks; see `fused.py`.

Every kernel reads its input once and computes in float32, whatever type the memory holds. It runs
on the device of its tensors, whichever is the current one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_C = 64
"""Channels of a block: 128 bytes of half precision, a line of the cache."""


@triton.jit
def _stats(
    x, add, means, squares, pixels, channels, chunks, step,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over ROWS pixels of one image."""
    chunk, n = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = chunk * ROWS + tl.arange(0, ROWS)
    mask = (rows < pixels)[:, None] & (c < channels)[None, :]
    place = rows[:, None] * channels + c[None, :]
    v = tl.load(x + n * pixels * channels + place, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(add + n * step + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    count = tl.minimum(ROWS, pixels - chunk * ROWS).to(tl.float32)
    mean = tl.sum(tl.where(mask, v, 0.0), axis=0) / count
    off = tl.where(mask, v - mean[None, :], 0.0)
    out = (n * chunks + chunk) * channels + c
    tl.store(means + out, mean, mask=c < channels)
    tl.store(squares + out, tl.sum(off * off, axis=0), mask=c < channels)


@triton.jit
def _combine(
    means, squares, add, weight, bias, scale, shift, pixels, channels, step, eps, width,
    chunks: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Scale and shift of the channels of one group from the parts of `_stats` (Chan's formula)."""
    n = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    c = tl.program_id(0) * width + lane
    inside = lane < width
    total = 0.0
    for first in range(0, chunks, CHUNKS):
        k = first + tl.arange(0, CHUNKS)
        count = tl.maximum(tl.minimum(ROWS, pixels - k * ROWS), 0).to(tl.float32)
        mask = (k < chunks)[:, None] & inside[None, :]
        place = (n * chunks + k)[:, None] * channels + c[None, :]
        mean = tl.load(means + place, mask=mask, other=0.0)
        total += tl.sum(tl.sum(mean * count[:, None], axis=1), axis=0)
    size = pixels * width * 1.0
    centre = total / size
    spread = 0.0
    for first in range(0, chunks, CHUNKS):
        k = first + tl.arange(0, CHUNKS)
        count = tl.maximum(tl.minimum(ROWS, pixels - k * ROWS), 0).to(tl.float32)
        mask = (k < chunks)[:, None] & inside[None, :]
        place = (n * chunks + k)[:, None] * channels + c[None, :]
        off = tl.load(means + place, mask=mask, other=0.0) - centre
        own = tl.load(squares + place, mask=mask, other=0.0) + count[:, None] * off * off
        spread += tl.sum(tl.sum(tl.where(mask, own, 0.0), axis=1), axis=0)
    rate = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    rate = rate / tl.sqrt(spread / size + eps)
    move = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32) - centre * rate
    if ADD:
        move += rate * tl.load(add + n * step + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(scale + n * channels + c, rate, mask=inside)
    tl.store(shift + n * channels + c, move, mask=inside)


@triton.jit
def _apply(
    x, out, scale, shift, pixels, channels,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (rows < pixels)[:, None] & (c < channels)[None, :]
    place = n * pixels * channels + rows[:, None] * channels + c[None, :]
    rate = tl.load(scale + n * channels + c, mask=c < channels, other=0.0)
    move = tl.load(shift + n * channels + c, mask=c < channels, other=0.0)
    v = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    v = v * rate[None, :] + move[None, :]
    if SILU:
        v = v / (1.0 + tl.exp(-v))
    tl.store(out + place, v.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add(
    a, b, bias, out, rows_in_all, channels, BIAS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (rows < rows_in_all)[:, None] & (c < channels)[None, :]
    place = rows[:, None] * channels + c[None, :]
    v = tl.load(a + place, mask=mask, other=0.0).to(tl.float32)
    v += tl.load(b + place, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, v.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _softmax(x, out, length, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    v = tl.load(x + row * length + i, mask=i < length, other=-float("inf")).to(tl.float32) * scale
    v = tl.exp(v - tl.max(v, axis=0))
    v = v / tl.sum(v, axis=0)
    tl.store(out + row * length + i, v.to(out.dtype.element_ty), mask=i < length)


@triton.jit
def _spread(
    maps, out, tile_rows, tile_columns, side, channels,
    SIDE: tl.constexpr, XS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add nine maps of a tile to `out`: upsampled inside the tile, laid out and shifted."""
    height, width = tile_rows * SIDE, tile_columns * SIDE
    window, top = tl.program_id(2) // height, tl.program_id(2) % height
    left = tl.program_id(0) * XS + tl.arange(0, XS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ratio = side * 1.0 / SIDE
    place = (window.to(tl.int64) * height + top) * width + left
    where = place[:, None] * channels + c[None, :]
    mask = (left < width)[:, None] & (c < channels)[None, :]
    total = tl.load(out + where, mask=mask, other=0.0).to(tl.float32)
    for k in tl.static_range(9):
        y, x = top + k // 3 - 1, left + k % 3 - 1
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        y, x = tl.maximum(y, 0), tl.maximum(x, 0)
        tile = (window * tile_rows + y // SIDE) * tile_columns + x // SIDE
        sy = tl.maximum((y % SIDE + 0.5) * ratio - 0.5, 0.0)
        sx = tl.maximum((x % SIDE + 0.5) * ratio - 0.5, 0.0)
        y0, x0 = sy.to(tl.int32), sx.to(tl.int32)
        fy, fx = sy - y0, sx - x0
        y1, x1 = tl.minimum(y0 + 1, side - 1), tl.minimum(x0 + 1, side - 1)
        base = tile.to(tl.int64) * side
        ok = inside[:, None] & mask
        for j in tl.static_range(4):
            row, rate = (y0, 1.0 - fy) if j < 2 else (y1, fy)
            column, part = (x0, 1.0 - fx) if j % 2 == 0 else (x1, fx)
            at = (((base + row) * side + column) * 9 + k) * channels
            v = tl.load(maps + at[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
            total += v * (rate * part)[:, None]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=mask)


def group_norm(x: Tensor, norm: Any, *, silu: bool, add: Tensor | None) -> Tensor:
    """See `fused.group_norm`; x is channels_last, add (1 or B, C) with channels side by side."""
    b, c, h, w = x.shape
    pixels, rows = h * w, min(256, triton.next_power_of_2(h * w))
    chunks, blocks = triton.cdiv(pixels, rows), triton.cdiv(c, BLOCK_C)
    means, squares = torch.empty((2, b, chunks, c), dtype=torch.float32, device=x.device)
    scale, shift = torch.empty((2, b, c), dtype=torch.float32, device=x.device)
    step = 0 if add is None or len(add) == 1 else add.stride(0)
    extra = x if add is None else add
    has, width = add is not None, c // norm.num_groups
    out, some = torch.empty_like(x), min(128, rows)
    with torch.cuda.device(x.get_device()):
        _stats[chunks, blocks, b](
            x, extra, means, squares, pixels, c, chunks, step, has, rows, BLOCK_C, num_warps=8
        )
        _combine[norm.num_groups, b](
            means, squares, extra, norm.weight, norm.bias, scale, shift, pixels, c, step,
            norm.eps, width, chunks, has, rows, min(64, triton.next_power_of_2(chunks)),
            triton.next_power_of_2(width),
        )  # fmt: skip
        _apply[triton.cdiv(pixels, some), blocks, b](
            x, out, scale, shift, pixels, c, silu, some, BLOCK_C, num_warps=8
        )
    return out


def add_bias(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """See `fused.add_bias`; both are channels_last."""
    out = torch.empty_like(a)
    rows, c = a.numel() // a.shape[1], a.shape[1]
    grid = (triton.cdiv(rows, 128), triton.cdiv(c, BLOCK_C))
    has = bias is not None
    with torch.cuda.device(a.get_device()):
        _add[grid](a, b, bias if has else a, out, rows, c, has, 128, BLOCK_C, num_warps=8)
    return out


def softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Softmax of scores x scale along the last axis, of any type, as `dtype`."""
    length = scores.shape[-1]
    out = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    block = triton.next_power_of_2(length)
    warps = min(16, max(1, block // 256))
    with torch.cuda.device(scores.get_device()):
        _softmax[(scores.numel() // length,)](scores, out, length, scale, block, num_warps=warps)
    return out


def spread(maps: Tensor, out: Tensor, *, tile_rows: int, tile_columns: int) -> None:
    """Add upsampled, shifted maps to `out` in place; see `fused.spread`.

    Args:
        maps: (B * R * K, s, s, 9 * C), contiguous, the nine of a kernel row by row.
        out: (B, C, R * side, K * side), channels_last.
        tile_rows: R.
        tile_columns: K.
    """
    b, c, height, width = out.shape
    side = height // tile_rows
    xs, block = 8, min(128, triton.next_power_of_2(c))
    grid = (triton.cdiv(width, xs), triton.cdiv(c, block), b * height)
    with torch.cuda.device(out.get_device()):
        _spread[grid](maps, out, tile_rows, tile_columns, maps.shape[1], c, side, xs, block)
