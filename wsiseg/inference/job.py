"""What is settled before a slide is read: options, windows, batches, memory. Knows no canvas."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from wsiseg.errors import UsageError
from wsiseg.geometry import Grid
from wsiseg.inference.contracts import TissueLike
from wsiseg.inference.engine import DTYPES, Engine, resolve_precision
from wsiseg.inference.fast import to_fast
from wsiseg.inference.features import Schedule, schedule, tile_bytes
from wsiseg.inference.plan import Plan, plan
from wsiseg.inference.side_by_side import at_a_time
from wsiseg.models.folding import fold
from wsiseg.models.segmenter import Segmenter
from wsiseg.models.views import ViewedSegmenter

GIB = 1 << 30
WORKERS_CPU, WORKERS_GPU = 4, 8
BATCH_GPU = 64


@dataclass(frozen=True)
class PredictOptions:
    """How a slide is worked through; only overlap, precision, seed and tta change what is computed.

    The resolution, the window and the classes are the model's and cannot be chosen.
    """

    overlap_px: int | None = None
    """Pixels that neighbouring windows have in common, 0 to 15/16 of a window; None takes a third.
    Where window - overlap is a multiple of the tile, windows share tiles and overlap costs next to
    nothing."""
    batch_size: int | None = None
    """Tiles encoded at a time; None takes one a core, at most 4, on a CPU and 64 on other devices,
    which compute them in parts where their memory does not do. On a CPU results are the same bit
    for bit whatever it is; elsewhere sums may be rounded differently."""
    workers: int | None = None
    """Threads that read the slide; None takes one a processor, at most 4 (8 for a GPU)."""
    memory_gib: float = 1.0
    """Memory for features and sums: a quarter for the sums of unfinished chunks, the rest for tile
    features, those of the window and of a default batch in hand included; on a CUDA device instead
    an eighth and a quarter of all its memory, used or not, so that an interrupted run can be
    continued. More than fits is encoded again or kept in files; on a CPU the result is the same."""
    precision: str = "auto"
    """"auto", "fp32", "bf16" or "fp16"; auto is bf16 on CUDA and fp32 elsewhere."""
    seed: int = 0
    """Seed of the noise that diffusion features are read at."""
    tta: bool = False
    """Whether to average over the eight flips and quarter turns, at eight times the cost."""
    resume: bool = False
    """Whether to go on with a canvas that an interrupted run of the same work left, and to leave
    one where this run is interrupted. On a CPU the result is the same; on a GPU
    the last batch may be computed in another way, and differ by a rounding."""

    def overlap_of(self, window_px: int) -> int:
        """Pixels that neighbouring windows of a model have in common."""
        return window_px // 3 if self.overlap_px is None else self.overlap_px

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
    if segmenter.device.type == "cuda":
        segmenter = to_fast(
            segmenter, DTYPES[resolve_precision(options.precision, segmenter.device)]
        )
    segmenter = fold(segmenter)
    if options.tta:
        segmenter = ViewedSegmenter(segmenter)
    engine = Engine(segmenter, precision=options.precision, seed=options.seed)
    layout = plan(
        grid,
        tissue,
        window_px=info.window_px,
        tile_px=info.tile_px,
        overlap_px=options.overlap_of(info.window_px),
    )
    batch_size = options.batch_size or (BATCH_GPU if engine.batches else at_a_time())
    room, blend_bytes = memory_bytes(engine.device, options.memory_gib)
    capacity = room // tile_bytes(segmenter, engine.dtype)
    if not engine.batches:
        capacity -= layout.window_tiles.shape[1] + at_a_time()  # the window in hand, and a batch
    workers = WORKERS_GPU if engine.batches else WORKERS_CPU
    return Job(
        layout=layout,
        loads=schedule(layout, capacity=max(1, capacity)) if len(layout.windows) else None,
        engine=engine,
        batch_size=batch_size,
        group=max(1, batch_size // layout.window_tiles.shape[1]) if engine.batches else 1,
        workers=options.workers or min(workers, os.cpu_count() or 1),
        blend_bytes=blend_bytes,
    )


def memory_bytes(device: torch.device, memory_gib: float) -> tuple[int, int]:
    """Bytes for tile features and for the sums of unfinished chunks; see `PredictOptions`."""
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        return total // 4, total // 8
    quarter = int(memory_gib * GIB / 4)
    return 3 * quarter, quarter
