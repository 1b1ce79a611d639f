"""What a prediction will cost, before it is made. Knows no slides and reads no pixels of one."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from wsiseg.geometry import Point
from wsiseg.inference.blend import accumulator_bytes
from wsiseg.inference.engine import Engine
from wsiseg.inference.features import FeatureStore, tile_bytes
from wsiseg.inference.job import Job
from wsiseg.inference.predict import CHUNK_PX


@dataclass(frozen=True)
class Speed:
    """Measured seconds of one tile in the extractor and of one window in the head."""

    tile_s: float
    window_s: float


@dataclass(frozen=True)
class Estimate:
    """The cost of a job.

    Attributes:
        windows: windows to classify.
        tiles: tiles to encode, those encoded again for lack of memory included.
        recomputed: tiles among them that are encoded again.
        tiles_without_sharing: tiles if every window were computed by itself.
        memory_gib: peak of the working memory: features, unfinished chunks, one batch and what the
            weights take; without the libraries themselves.
        seconds: model time only, from `Speed`; reading and writing come on top where they are
            slower than the model.
    """

    windows: int
    tiles: int
    recomputed: int
    tiles_without_sharing: int
    memory_gib: float
    seconds: float


def measure_speed(engine: Engine, *, tiles: int = 4) -> Speed:
    """Time the model on `tiles` tiles and one window of random pixels, after one warm-up tile."""
    info = engine.segmenter.info
    side = info.window_px // info.tile_px
    shape = (info.tile_px, info.tile_px, 3)
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, shape, np.uint8) for _ in range(tiles)]
    places = [Point(k * info.tile_px, 0) for k in range(tiles)]
    engine.encode(pixels[:1], places[:1])
    began = _now(engine.device)
    features = engine.encode(pixels, places)
    tile_s = (_now(engine.device) - began) / tiles
    store = FeatureStore(tiles, dtype=engine.dtype, device=engine.device)
    store.put(range(tiles), features)
    window = store.windows(np.arange(side * side, dtype=np.int64)[None] % tiles)
    began = _now(engine.device)
    engine.classify(window, places[:1])
    return Speed(tile_s, _now(engine.device) - began)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def estimate(job: Job, speed: Speed) -> Estimate:
    """The cost of a job at a measured speed."""
    layout, engine = job.layout, job.engine
    info = engine.segmenter.info
    windows = len(layout.windows)
    if job.loads is None:
        return Estimate(0, 0, 0, 0, 0.0, 0.0)
    tiles = len(job.loads.tiles)
    features = tile_bytes(engine.segmenter, engine.dtype)
    held = job.loads.slots(batch_size=job.batch_size, group=job.group) * features
    in_hand = job.batch_size + job.group * layout.window_tiles.shape[1]  # heads copy their maps
    chunk = accumulator_bytes(info.output_count, CHUNK_PX)
    sums = min(max(job.blend_bytes, chunk), layout.live_chunks(CHUNK_PX) * chunk)
    planes = job.group * 8 * info.output_count * info.window_px**2
    pixels = 3 * info.tile_px**2 * (3 * job.batch_size + job.workers + 4 * job.batch_size)
    weights = sum(t.nbytes for t in (*engine.segmenter.parameters(), *engine.segmenter.buffers()))
    return Estimate(
        windows=windows,
        tiles=tiles,
        recomputed=job.loads.recomputed,
        tiles_without_sharing=layout.tiles_without_sharing,
        memory_gib=(held + in_hand * features + sums + planes + pixels + weights) / (1 << 30),
        seconds=tiles * speed.tile_s + windows * speed.window_s,
    )
