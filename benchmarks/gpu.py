"""The full-size model on a GPU: ceilings, parts, whole, a slide end to end, labels, kernels.

    python benchmarks/gpu.py --seconds 140 --json gpu.json

Rates are judged against a bf16 matrix product measured in the same run. Weights are random, the
slide is painted. A stage that fails or finds no time left says so and the others go on; the exit
code is then 1. Equality comes first: kernels and fused blocks are compared with float64 and
float32. With `--device cpu --model small` everything runs small, without graphs and kernels.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import click
import torch
from gpu_checks import check_kernels, check_networks, labels
from gpu_ways import (
    PARTS,
    bf16,
    by_pixel,
    captured,
    copy_tbs,
    flops,
    inputs,
    matrix_tflops,
    median_ms,
    part_work,
    synchronise,
    ways,
    within,
)
from shared import Within, run
from stand_in_data import write_sparse_slide
from stand_ins import stand_in
from timing import command_line, machine

from wsiseg.atomic import staged
from wsiseg.errors import UsageError
from wsiseg.geometry import Box, Point, Size
from wsiseg.inference.fast import FastExtractor
from wsiseg.inference.predict import PredictOptions, predict_slide
from wsiseg.models.fused import channels_last
from wsiseg.slides.slide import open_slide
from wsiseg.slides.tissue import find_tissue

REFERENCE_TILES = 9155
"""Tiles of a slide of 50,000 x 40,000 px with tissue on 30 %."""
SHARE, BUSY = 0.40, 0.90
"""The least share of the matrix rate over the backbone, and of the wall time with work."""
Stage = Callable[["Bench"], None]


class Bench:
    """What the stages share: the model, the time left, the numbers found."""

    def __init__(self, words: dict[str, Any]) -> None:
        self.words, self.began = words, time.perf_counter()
        self.device = torch.device(words["device"])
        self.batch = int(words["batch"])
        self.numbers: dict[str, Any] = {}
        self.lines: list[str] = []
        self.failed: list[str] = []
        torch.backends.cudnn.allow_tf32 = False
        try:
            with torch.device(self.device):  # random weights are drawn there, which is faster
                self.model = stand_in(words["model"], words["device"])
        except (RuntimeError, NotImplementedError):
            self.model = stand_in(words["model"], words["device"])
        self.flops = flops(self.model)
        self.tile_flops = sum(self.flops[p] for p in PARTS if p != "head")

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return float(self.words["seconds"]) - (time.perf_counter() - self.began)

    def say(self, line: str, **numbers: Any) -> None:
        """Print a line now, keep it for the table at the end, and keep its numbers."""
        self.numbers.update(numbers)
        self.lines.append(line)
        click.echo(f"[{time.perf_counter() - self.began:6.1f}] {line}")

    def run(self, name: str, stage: Stage, *, needs_s: float) -> None:
        """Run a stage if there is time; what goes wrong is told and the next one goes on."""
        if self.left < needs_s:
            self.failed.append(name)
            self.say(f"{name}: left out, {self.left:.0f} s left of {needs_s:.0f} needed")
            return
        try:
            stage(self)
            synchronise(self.device)
        except Exception as e:
            self.failed.append(name)
            traceback.print_exc()
            self.say(f"{name}: FAILED, {type(e).__name__}: {str(e)[:300]}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def share(self, flop: float, ms: float) -> float:
        """Share of the measured matrix rate."""
        return flop / ms / 1e9 / float(self.numbers.get("matrix_tflops", float("nan")))


def ceilings(bench: Bench) -> None:
    """The rates that the device reaches."""
    side = 8192 if bench.device.type == "cuda" else 256
    rate = matrix_tflops(bench.device, side, most_s=2)
    copies = copy_tbs(bench.device, side * side * 8, most_s=1)
    bench.say(f"bf16 matrix product of {side}: {rate:.4g} TFLOP/s", matrix_tflops=rate)
    bench.say(f"copy: {copies:.3g} TB/s", copy_tbs=copies)
    counted = {p: f / 1e9 for p, f in bench.flops.items()}
    bench.say(
        f"GFLOP a tile {bench.tile_flops / 1e9:.4g}: "
        + ", ".join(f"{p} {n:.4g}" for p, n in counted.items())
        + " (head: a window)",
        gflop=counted,
    )


def parts(bench: Bench) -> None:
    """Each part in every way."""
    most_s = 0.4 if bench.device.type == "cuda" else 0.01
    found: dict[str, dict[str, float]] = {}
    for part in PARTS:
        count = max(1, bench.batch // 9) if part == "head" else bench.batch
        for name, work, items in ways(bench.model, part, count):
            ms = median_ms(work, bench.device, most_s=most_s)
            share = bench.share(bench.flops[part] * items, ms)
            found.setdefault(part, {})[name] = ms / items
            bench.say(
                f"{part:12s} {name:18s} {items:3d} x {ms / items:8.4f} ms, {100 * share:5.1f} %"
            )
    bench.numbers["parts_ms"] = found


def whole(bench: Bench) -> None:
    """The backbone as prediction runs it: as a graph, and with noise from the host."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    source: Any = bench.model.extractor
    fast = FastExtractor(source, torch.bfloat16)
    for count in sorted({max(1, bench.batch // 2), bench.batch, 2 * bench.batch}):
        found = backbone(bench, fast, count)
        bench.numbers.setdefault("backbone", {})[count] = found
        if count == bench.batch and bench.device.type == "cuda":
            images, places = _tiles(bench, fast.tile_px, count)
            call = within(lambda i=images, p=places: fast(i, p, 0))
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            with kernel_times(bench, "backbone, one batch"):
                call()
                torch.cuda.synchronize()
    if bench.device.type == "cuda":
        most = torch.cuda.max_memory_allocated() / 2**30
        bench.say(f"most memory, with the float32 model and both graphs: {most:.1f} GiB")


def _tiles(bench: Bench, side: int, count: int) -> tuple[torch.Tensor, list[Point]]:
    images = torch.rand(count, 3, side, side, device=bench.device) * 2 - 1
    return images, [Point(k * side, 0) for k in range(count)]


def backbone(bench: Bench, fast: FastExtractor, count: int, note: str = "") -> dict[str, float]:
    """Time one batch size: the network alone, judged, and five batches with all that feeds it."""
    images, places = _tiles(bench, fast.tile_px, count)
    half = channels_last(images.bfloat16())
    with torch.inference_mode():
        noise = fast.noise(places, 0)
    alone = within(lambda: fast.compute(half, *noise))
    if bench.device.type == "cuda":
        alone = captured(alone)
    ms = median_ms(alone, bench.device, most_s=1) / count
    del alone
    rounds = 5 if bench.device.type == "cuda" else 1
    call = within(lambda: [fast(images, places, 0) for _ in range(rounds)][-1])
    fed = median_ms(call, bench.device, most_s=1, warm=1) / count / rounds
    share = bench.share(bench.tile_flops, ms)
    verdict = "met" if share >= SHARE else "missed"
    bench.say(
        f"backbone{note}, batch {count}: {1e3 / ms:.1f} tiles/s, {100 * share:.1f} % of the matrix "
        f"rate (target {100 * SHARE:.0f} %, {verdict}); with noise from the host {1e3 / fed:.1f}"
    )
    return {"ms": ms, "share": share, "fed_ms": fed}


def autotuned(bench: Bench) -> None:
    """The backbone where cuDNN times its convolutions first."""
    source: Any = bench.model.extractor
    torch.backends.cudnn.benchmark = True
    try:
        began = time.perf_counter()
        found = backbone(bench, FastExtractor(source, torch.bfloat16), bench.batch, ", cuDNN tuned")
        bench.say(f"  with tuning: {time.perf_counter() - began:.1f} s", autotuned=found)
    finally:
        torch.backends.cudnn.benchmark = False


def compiled(bench: Bench) -> None:
    """Parts through torch.compile instead of fused blocks."""
    for part in ("first_stage", "unet"):
        if bench.left < 25 and bench.device.type == "cuda":
            bench.say(f"compile {part}: left out, {bench.left:.0f} s left")
            continue
        made = bf16(bench.model, part, fusing=False)
        values = by_pixel(inputs(bench.model, part, bench.batch, torch.float32))
        work = within(torch.compile(part_work(made, part, values), dynamic=False))
        began = time.perf_counter()
        work()
        synchronise(bench.device)
        took = time.perf_counter() - began
        if bench.device.type == "cuda":
            work = captured(work)
        ms = median_ms(work, bench.device, most_s=1) / bench.batch
        share = bench.share(bench.flops[part], ms)
        bench.say(f"{part:12s} compiled {ms:8.4f} ms, {100 * share:5.1f} %; compiling {took:.0f} s")


@contextmanager
def kernel_times(bench: Bench, what: str, most: int = 16) -> Iterator[dict[str, float]]:
    """Profile the block: the kernels that take most, and the share of its time with work."""
    found: dict[str, float] = {}
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        began = time.perf_counter()
        yield found
        found["wall_s"] = time.perf_counter() - began
    result: Any = profile.profiler
    kernels = [
        (e.name(), e.start_ns(), e.duration_ns())
        for e in result.kineto_results.events()
        if e.device_type() == torch.autograd.DeviceType.CUDA and e.duration_ns() > 0
    ]
    busy, end, times = 0, 0, dict[str, list[float]]()
    for name, start, duration in sorted(kernels, key=lambda k: k[1]):
        busy += max(0, start + duration - max(start, end))
        end = max(end, start + duration)
        times.setdefault(name, []).append(duration / 1e6)
    found["busy_s"] = busy / 1e9
    total = sum(map(sum, times.values())) or 1.0
    bench.say(f"{what}: {len(kernels)} kernels, {total:.1f} ms")
    top = sorted(times.items(), key=lambda item: -sum(item[1]))[:most]
    for name, own in top:
        bench.say(
            f"  {100 * sum(own) / total:5.1f} % {sum(own):9.2f} ms {len(own):5d} x {name[:90]}"
        )
    table = bench.numbers.setdefault("kernels", {})
    table[what] = [[name, sum(own), len(own)] for name, own in top]


def end_to_end(bench: Bench) -> None:
    """A slide through `predict_slide`: a part that does not count, all of it, and profiled."""
    options = PredictOptions(batch_size=bench.batch)
    with tempfile.TemporaryDirectory() as name:
        path, folder = Path(name) / "painted.tif", Path(name)
        began = time.perf_counter()
        write_sparse_slide(path, Size(*bench.words["size"]))
        with open_slide(path) as slide:
            tissue, info = find_tissue(slide), bench.model.info
            bench.say(
                f"slide of {bench.words['size']} painted: {time.perf_counter() - began:.1f} s"
            )
            side = min(6 * info.window_px, slide.grid(info.mpp).size.width)
            part = Within(tissue, Box(0, 0, side, side))
            began = time.perf_counter()
            predict_slide(slide, bench.model, folder / "part", options=options, tissue=part)
            bench.say(f"first part, with everything set up: {time.perf_counter() - began:.1f} s")
            with utilisation(bench) as seen:
                canvas = predict_slide(
                    slide, bench.model, folder / "all", options=options, tissue=tissue
                )
            _tell(bench, canvas.record["timings"], seen)
            if bench.device.type == "cuda" and bench.left > 15:
                with kernel_times(bench, "slide", most=12) as found:
                    predict_slide(slide, bench.model, folder / "p", options=options, tissue=tissue)
                busy = found["busy_s"] / found["wall_s"]
                verdict = "met" if busy >= BUSY else "missed"
                bench.say(
                    f"profiled: busy {100 * busy:.1f} % of {found['wall_s']:.2f} s wall "
                    f"(target {100 * BUSY:.0f} %, {verdict})",
                    busy=busy,
                )


def _tell(bench: Bench, timings: dict[str, Any], seen: list[float]) -> None:
    rate, tiles = timings["tiles_per_s"], timings["tiles"]
    if not tiles:
        raise UsageError("no tissue on the slide; give a larger --size")
    mean = sum(seen) / len(seen) if seen else float("nan")
    tflops = (bench.tile_flops * tiles + bench.flops["head"] * timings["windows"]) / 1e12
    bench.say(f"end to end: {timings}", end_to_end=timings)
    bench.say(
        f"end to end: {rate:.1f} tiles/s, {tflops / timings['total']:.0f} TFLOP/s with the head; "
        f"nvidia-ml says busy {mean:.0f} % of the samples"
    )
    bench.say(
        f"a slide of {REFERENCE_TILES} tiles: {REFERENCE_TILES / rate:.1f} s, extrapolated",
        slide_s=REFERENCE_TILES / rate,
    )


@contextmanager
def utilisation(bench: Bench) -> Iterator[list[float]]:
    """Percent of time with a kernel, sampled while the block runs; empty where nothing tells."""
    seen: list[float] = []
    stop = Event()

    def sample() -> None:
        while not stop.wait(0.2):
            try:
                seen.append(float(torch.cuda.utilization()))
            except Exception:  # of the vendor's library, where it is missing
                return

    thread = Thread(target=sample, daemon=True)
    if bench.device.type == "cuda":
        thread.start()
    try:
        yield seen
    finally:
        stop.set()


STAGES: dict[str, tuple[Stage, float]] = {
    "ceilings": (ceilings, 1),
    "kernels": (check_kernels, 1),
    "networks": (check_networks, 1),
    "labels": (labels, 12),
    "whole": (whole, 5),
    "end_to_end": (end_to_end, 20),
    "parts": (parts, 15),
    "autotuned": (autotuned, 25),
    "compiled": (compiled, 30),
}
LAST = "compiled"
"""Takes long, so it is run where asked for only."""


@click.command(help=__doc__.splitlines()[0])
@click.option("--device", default="cuda", show_default=True)
@click.option("--model", default="full", show_default=True, help="full or small.")
@click.option("--batch", default=64, show_default=True, help="Tiles at a time.")
@click.option("--size", type=int, nargs=2, default=(20480, 16384), help="The slide, in pixels.")
@click.option("--seconds", default=140.0, show_default=True, help="Budget of all stages.")
@click.option("--stages", default=",".join(s for s in STAGES if s != LAST), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Numbers here.")
def main(**words: Any) -> None:
    """Run the stages in turn."""
    stages = words["stages"].split(",")
    if wrong := [name for name in stages if name not in STAGES]:
        raise UsageError(f"--stages {wrong[0]}: not one of {', '.join(STAGES)}")
    bench = Bench(words)
    bench.say(f"model {words['model']} on {machine()['gpu'] or 'cpu'}: set up")
    for name in stages:
        stage, needs_s = STAGES[name]
        bench.run(name, stage, needs_s=needs_s)
    click.echo("\n".join(["", "SUMMARY", *bench.lines]))
    if words["json_path"] is not None:
        result = {"command": command_line(), "machine": machine(), "torch": torch.__version__}
        result |= {"numbers": bench.numbers, "failed": bench.failed, "lines": bench.lines}
        with staged(words["json_path"]) as (temporary,):
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    if bench.failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
