"""Ways to run the parts of a PathSegDiff model on a GPU, clocks of the device, and its ceilings."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import wsiseg.models.fused as fused
from wsiseg.models.extractors.fused_blocks import fold_times, fuse
from wsiseg.models.extractors.latent import encode_with_details, read_taps
from wsiseg.models.segmenter import Segmenter

Work = Callable[[], Any]
PARTS = ("vit", "first_stage", "unet", "head")


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_ms(work: Work, device: torch.device, *, most_s: float, warm: int = 2) -> float:
    """Median milliseconds of a call, by the device's clock, in at most about `most_s` seconds."""
    for _ in range(warm):
        work()
    synchronise(device)
    began, times = time.perf_counter(), []
    while len(times) < 20 and (len(times) < 3 or time.perf_counter() - began < most_s):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        else:
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def matrix_tflops(device: torch.device, side: int, *, most_s: float) -> float:
    """TFLOP/s of a bf16 matrix product of random numbers."""
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return 2 * side**3 / median_ms(lambda: a @ b, device, most_s=most_s, warm=3) / 1e9


def copy_tbs(device: torch.device, values: int, *, most_s: float) -> float:
    """TB/s of a copy on the device, bytes read and bytes written."""
    a = torch.randn(values, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / median_ms(lambda: b.copy_(a), device, most_s=most_s) / 1e9


def captured(work: Work) -> Work:
    """The kernels of a call as one CUDA graph; what it gives is overwritten by every replay."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()

    def replay() -> Any:
        graph.replay()
        return found

    return replay


def flops(segmenter: Segmenter) -> dict[str, float]:
    """FLOPs of each part, a tile (the head: a window), counted on the meta device."""
    meta = copy.deepcopy(segmenter).to("meta")
    found = {}
    for part in PARTS:
        work = part_work(meta, part, inputs(meta, part, 1, torch.float32))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            work()
        found[part] = float(counter.get_total_flops())
    return found


def inputs(segmenter: Segmenter, part: str, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random inputs of a part: of `count` tiles, or of `count` windows for the head."""
    e: Any = segmenter.extractor
    device, side = segmenter.device, e.tile_px // e.config.first_stage.factor
    if part in ("vit", "first_stage"):
        shapes: list[tuple[int, ...]] = [(count, 3, e.tile_px, e.tile_px)]
    elif part == "unet":
        tokens = 2 if e.config.region_dim else 1
        channels, width = e.config.first_stage.latent_channels, e.config.unet.context_dim
        shapes = [(count, channels, side, side), (count, tokens, width)]
    else:
        tiles = segmenter.info.window_px // e.tile_px
        shapes = [
            (count, tiles, tiles, e.tile_px // s.stride, e.tile_px // s.stride, s.channels)
            for s in segmenter.map_specs
        ]
    found = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    if part == "head":
        return tuple(t.permute(0, 1, 2, 5, 3, 4) for t in found)
    return tuple(found)


def part_work(segmenter: Segmenter, part: str, values: tuple[Tensor, ...]) -> Work:
    """A call of a part on inputs of `inputs`."""
    e: Any = segmenter.extractor
    if part == "vit":
        return lambda: e.context(values[0])
    if part == "first_stage":
        return lambda: encode_with_details(e.first_stage, e.config.first_stage, values[0], ())[0]
    if part == "unet":
        step, taps = e.config.timesteps[0], e.config.taps
        return lambda: read_taps(e.unet, values[0], step, values[1], taps)
    return lambda: segmenter.window_probabilities(values)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside the block fused operations are torch's own."""
    with mock.patch.object(fused, "_there", return_value=False):
        yield


def ways(segmenter: Segmenter, part: str, count: int) -> Iterator[tuple[str, Work, int]]:
    """(name, call, tiles or windows) of the ways to run a part, the plain one first."""
    device, few = segmenter.device, max(1, count // 4)
    half = partial(torch.autocast, device.type, dtype=torch.bfloat16)
    plain = part_work(segmenter, part, inputs(segmenter, part, few, torch.float32))
    yield "fp32", within(plain, without_kernels), few
    dtype = torch.float32 if part != "head" else torch.bfloat16
    values = inputs(segmenter, part, count, dtype)
    work = part_work(segmenter, part, values)
    yield "autocast", within(work, half, without_kernels), count
    if part == "head":
        yield "autocast, kernels", within(work, half), count
        return
    values = by_pixel(values)
    for name, fusing in (("bf16 by pixel", False), ("fused", True)):
        made = bf16(segmenter, part, fusing=fusing)
        work = within(part_work(made, part, values))
        yield name, work, count
        if fusing and device.type == "cuda":
            yield "fused, graph", captured(work), count


def by_pixel(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs in bf16, maps with the channels of a pixel side by side."""
    return tuple(fused.channels_last(t.bfloat16()) if t.ndim == 4 else t.bfloat16() for t in values)


def within(work: Work, *modes: Callable[[], Any]) -> Work:
    """A call without gradients, inside context managers made anew for every call."""

    def call() -> Any:
        with torch.inference_mode(), ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode())
            return work()

    return call


def bf16(segmenter: Segmenter, part: str, *, fusing: bool) -> Segmenter:
    """The segmenter with one part of its extractor in bf16, channels side by side."""
    made = copy.copy(segmenter)
    made._modules = dict(segmenter._modules)
    extractor: Any = copy.copy(segmenter.extractor)
    extractor._modules = dict(segmenter.extractor._modules)
    names = {"vit": ("encoder", "conditioner"), "first_stage": ("first_stage",), "unet": ("unet",)}
    for name in names[part]:
        own: nn.Module = copy.deepcopy(extractor._modules[name])
        nn.Module.to(own, torch.bfloat16)
        nn.Module.to(own, memory_format=torch.channels_last)  # type: ignore[call-overload]
        extractor._modules[name] = fuse(own) if fusing else own
        if fusing and name == "unet":
            fold_times(own, extractor.config.timesteps)
    made._modules["extractor"] = extractor
    return made
