"""One slide through a segmenter into a canvas. Knows no slide formats and no output files."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsiseg.canvas import Canvas
from wsiseg.errors import CanvasError, UsageError
from wsiseg.geometry import Grid
from wsiseg.inference.blend import Blender
from wsiseg.inference.contracts import Progress, SlideLike, TissueLike
from wsiseg.inference.engine import (
    BATCH_CPU,
    BATCH_GPU,
    Engine,
    Stopwatch,
    WindowFeatures,
)
from wsiseg.inference.features import Schedule, groups, schedule, tile_bytes
from wsiseg.inference.normalise import stain_parameters
from wsiseg.inference.objects import make_objects, wants_objects
from wsiseg.inference.plan import Plan, plan
from wsiseg.inference.reader import TileReader
from wsiseg.inference.record import slide_record, versions
from wsiseg.models.segmenter import Segmenter
from wsiseg.models.views import ViewedSegmenter

GIB = 1 << 30
THUMBNAIL_PX = 1600
CHUNK_PX = 512
WORKERS = 4


@dataclass(frozen=True)
class PredictOptions:
    """How a slide is worked through; only overlap, precision, seed and tta change what is computed.

    The resolution, the window and the classes are the model's and cannot be chosen.
    """

    overlap_px: int = 256
    """Pixels that neighbouring windows have in common, 0..window - 1. Where window - overlap is a
    multiple of the tile, windows share tiles and overlap costs next to nothing."""
    batch_size: int | None = None
    """Tiles encoded at a time; None takes 4 on a CPU and 64 on other devices. On a CPU results are
    the same bit for bit whatever it is; elsewhere sums may be rounded differently."""
    workers: int | None = None
    """Threads that read the slide; None takes one a processor, at most 4."""
    memory_gib: float = 1.0
    """Memory for what is kept between windows: half for tile features (on a CUDA device: a quarter
    of its free memory instead), half for the sums of unfinished chunks. More than fits is encoded
    again or kept in files; the result is the same."""
    precision: str = "auto"
    """"auto", "fp32", "bf16" or "fp16"; auto is bf16 on CUDA and fp32 elsewhere."""
    seed: int = 0
    """Seed of the noise that diffusion features are read at."""
    tta: bool = False
    """Whether to average over the eight flips and quarter turns, at eight times the cost."""

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch size {self.batch_size}: must be at least 1")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"{self.workers} workers: must be at least 1")
        if not 0.01 <= self.memory_gib <= 4096:
            raise UsageError(f"memory of {self.memory_gib} GiB: must be from 0.01 to 4096")


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that is settled before the first tile is read.

    Attributes:
        layout: windows and tiles.
        loads: what is encoded when; None where there are no windows.
        engine: the model at its precision.
        batch_size: tiles encoded at a time.
        group: windows classified at a time.
        workers: reader threads.
        blend_bytes: memory for unfinished chunks.
    """

    layout: Plan
    loads: Schedule | None
    engine: Engine
    batch_size: int
    group: int
    workers: int
    blend_bytes: int


def prepare(
    grid: Grid,
    segmenter: Segmenter,
    *,
    options: PredictOptions,
    tissue: TissueLike | None = None,
) -> Job:
    """Settle windows, batches and memory for a slide's grid.

    Raises:
        UsageError: an overlap, precision or size that cannot be.
        ModelError: a window that is not a whole number of tiles.
    """
    info = segmenter.info
    if options.tta:
        segmenter = ViewedSegmenter(segmenter)
    engine = Engine(segmenter, precision=options.precision, seed=options.seed)
    layout = plan(
        grid,
        tissue,
        window_px=info.window_px,
        tile_px=info.tile_px,
        overlap_px=options.overlap_px,
    )
    on_cpu = engine.device.type == "cpu"
    batch_size = options.batch_size or (BATCH_CPU if on_cpu else BATCH_GPU)
    half = int(options.memory_gib * GIB / 2)
    room = torch.cuda.mem_get_info(engine.device)[0] // 4 if engine.device.type == "cuda" else half
    capacity = max(1, room // tile_bytes(segmenter, engine.dtype))
    return Job(
        layout=layout,
        loads=schedule(layout, capacity=capacity) if len(layout.windows) else None,
        engine=engine,
        batch_size=batch_size,
        group=1 if on_cpu else max(1, batch_size // layout.window_tiles.shape[1]),
        workers=options.workers or min(WORKERS, os.cpu_count() or 1),
        blend_bytes=half,
    )


def predict_slide(
    slide: SlideLike,
    segmenter: Segmenter,
    canvas_path: str | Path,
    *,
    options: PredictOptions | None = None,
    tissue: TissueLike | None = None,
    progress: Progress | None = None,
) -> Canvas:
    """Segment a slide.

    Args:
        slide: an open slide.
        segmenter: the model; it runs where its weights are and is left in evaluation mode.
        canvas_path: folder for the canvas; an older canvas there is replaced.
        options: how to work; the defaults suit most slides.
        tissue: where to look, from `find_tissue(slide)`; None analyses the whole slide, glass
            included. Pixels outside are 0 in the canvas.
        progress: called with (tiles encoded, tiles in all) after every batch.

    Returns:
        The complete canvas. `canvas.record["status"]` is "ok", or "no tissue" where the mask left
        nothing to analyse and every label is 0. Its record holds `slide`, `model`, `parameters`,
        `versions`, `status` and `timings`. The timings are seconds the loop spent in "read"
        (waiting for the reader threads), "encode", "head" and "blend"; on a GPU, whose work is
        waited for in "head", that part holds most of "encode" too. Where the model asks for
        post-processing, "objects" is that of `make_objects`.

    Raises:
        UsageError: an option that cannot be.
        SlideError: the slide cannot be read; the canvas is removed.
        ModelError: the model gave values that are no numbers; the canvas is removed.
        CanvasError: the canvas cannot be written, or `canvas_path` is something else.
    """
    options = options or PredictOptions()
    watch = Stopwatch()
    grid = slide.grid(segmenter.info.mpp)
    job = prepare(grid, segmenter, options=options, tissue=tissue)
    _check_target(Path(canvas_path))
    thumbnail = np.asarray(slide.thumbnail(THUMBNAIL_PX), np.uint8)
    with watch("read"):
        stain = stain_parameters(slide, segmenter.info, grid, thumbnail=thumbnail, tissue=tissue)
    record = _record(slide, job, options=options, tissue=tissue)
    record["parameters"].update(stain)
    canvas = Canvas.create(
        canvas_path,
        grid=grid,
        classes=segmenter.info.classes,
        record=record,
        chunk_px=CHUNK_PX,
        border=segmenter.info.border,
    )
    try:
        canvas.set_image("thumbnail", thumbnail)
        mask = np.ones((1, 1), np.uint8) if tissue is None else tissue.mask
        canvas.set_image("tissue", np.asarray(mask, np.uint8))
        blender = Blender(
            job.layout,
            len(segmenter.info.classes),
            canvas,
            tissue=tissue,
            memory_bytes=job.blend_bytes,
        )
        report = progress or (lambda done, total: None)
        matrix = stain.get("stain_matrix")
        _segment(slide, job, blender, watch=watch, progress=report, stain_matrix=matrix)
        if wants_objects(segmenter.info):
            with watch("objects"):
                make_objects(canvas, segmenter.info.objects)
        canvas.update_record(
            status="ok" if len(job.layout.windows) else "no tissue",
            timings=_timings(job, watch, spilled=blender.spilled),
        )
    except BaseException:
        canvas.remove()
        raise
    return canvas


def _segment(
    slide: SlideLike,
    job: Job,
    blender: Blender,
    *,
    watch: Stopwatch,
    progress: Progress,
    stain_matrix: Any,
) -> None:
    """The loop: read, encode, classify, blend."""
    if job.loads is None:
        blender.finish()
        return
    layout, engine = job.layout, job.engine
    features = WindowFeatures(engine, layout, job.loads, batch_size=job.batch_size, group=job.group)
    reader = TileReader(
        slide,
        layout.grid,
        tile_px=layout.tile_px,
        workers=job.workers,
        ahead=2 * job.batch_size + job.workers,
        stain_matrix=stain_matrix,
    )
    progress(0, features.count)
    with reader:
        tiles = reader.tiles(layout.tile_place(int(tile)) for tile in job.loads.tiles)
        for start, stop in groups(len(layout.windows), job.group):
            for encoded in features.take(start, stop, tiles, watch):
                progress(encoded, features.count)
            places = layout.places(start, stop)
            with watch("head"):
                probabilities = engine.classify(features.windows(start, stop), places)
            with watch("blend"):
                blender.add(probabilities, places)
    blender.finish()


def _check_target(path: Path) -> None:
    """Refuse to replace anything that is not a canvas or an empty folder."""
    if not path.exists():
        return
    if not path.is_dir() or (any(path.iterdir()) and not (path / "zarr.json").is_file()):
        raise CanvasError(f"{path}: exists and is not a canvas; choose another name or remove it")


def _record(
    slide: SlideLike, job: Job, *, options: PredictOptions, tissue: TissueLike | None
) -> dict[str, Any]:
    info = job.engine.segmenter.info
    return {
        "slide": slide_record(slide),
        "model": {"name": info.name, "sha256": info.sha256, "licence": info.licence},
        "parameters": {
            **asdict(options),
            "batch_size": job.batch_size,
            "workers": job.workers,
            "precision": job.engine.precision,
            "device": str(job.engine.device),
            "mpp": info.mpp,
            "window_px": info.window_px,
            "tile_px": info.tile_px,
            "tissue": "none" if tissue is None else "mask",
            **({"objects": asdict(info.objects)} if wants_objects(info) else {}),
        },
        "versions": versions(),
    }


def _timings(job: Job, watch: Stopwatch, *, spilled: int) -> dict[str, Any]:
    total = watch.total
    encoded = 0 if job.loads is None else len(job.loads.tiles)
    seconds = dict.fromkeys(("read", "encode", "head", "blend"), 0.0) | watch.seconds
    parts = {part: round(s, 3) for part, s in seconds.items()}
    return {
        **parts,
        "total": round(total, 3),
        "windows": len(job.layout.windows),
        "tiles": encoded,
        "tiles_distinct": len(job.layout.tiles),
        "tiles_recomputed": 0 if job.loads is None else job.loads.recomputed,
        "chunks_spilled": spilled,
        "tiles_per_s": round(encoded / total, 3) if total > 0 else 0.0,
    }
