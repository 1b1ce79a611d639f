"""Batches in parts that fit: every item once and in order, halved where need be, said once."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from inference_fakes import NoiseExtractor, SumHead, noise_model, random_slide
from torch import Tensor

from wsiseg.errors import DeviceMemoryError
from wsiseg.geometry import Grid, Point, Size
from wsiseg.inference.engine import Engine
from wsiseg.inference.features import schedule
from wsiseg.inference.job import GIB, PredictOptions, memory_bytes, prepare
from wsiseg.inference.memory import Parts, lacks_memory, memory_said
from wsiseg.inference.predict import predict_slide
from wsiseg.inference.side_by_side import at_a_time
from wsiseg.models.base import Features
from wsiseg.models.segmenter import Segmenter

CPU = torch.device("cpu")


def device_of(room: int, asked: list[tuple[int, int]]) -> object:
    """Work on a device that has room for so many at a time."""

    def work(start: int, stop: int) -> list[int]:
        asked.append((start, stop))
        if stop - start > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(start, stop))

    return work


@pytest.mark.parametrize("room", [1, 2, 3, 7, 10])
def test_all_in_order_whatever_fits(room: int) -> None:
    parts, asked = Parts(CPU, together=True), []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for count in (10, 3, 10):
            found = parts.run("tiles", count, device_of(room, asked))
            assert [n for part in found for n in part] == list(range(count))
        parts.run("windows", 4, device_of(room, []))
    assert len(said) == (room < 10), "once, whatever is halved after it"
    size = {1: 1, 2: 2, 3: 2, 7: 5}.get(room)
    assert parts.most.get("tiles") == size
    tried = [b - a for a, b in asked if b - a > room]
    assert len(tried) == len(set(tried)), "what does not fit is tried once"


def test_one_by_one_where_batches_are_not_computed_together() -> None:
    asked: list[tuple[int, int]] = []
    Parts(CPU, together=False).run("tiles", 3, device_of(9, asked))
    assert asked == [(0, 1), (1, 2), (2, 3)]


def test_no_room_for_a_single_one() -> None:
    gpu = torch.device("cuda:1")
    with pytest.raises(DeviceMemoryError, match=r"cpu: out of memory; .* a lower --memory"):
        Parts(CPU, together=False).run("tiles", 3, device_of(0, []))
    with pytest.raises(DeviceMemoryError, match=r"cuda:1: .* --batch-size, or --device cpu"):
        Parts(gpu, together=False).run("tiles", 3, device_of(0, []))
    with pytest.raises(DeviceMemoryError), memory_said(gpu):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_other_errors_stay_what_they_are() -> None:
    def work(start: int, stop: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        Parts(CPU, together=True).run("tiles", 3, work)
    with pytest.raises(RuntimeError, match="illegal"), memory_said(CPU):
        work(0, 1)
    for text in (
        "MPS backend out of memory (MPS allocated: 9 GB)",
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ):
        assert lacks_memory(RuntimeError(text))
    assert not lacks_memory(ValueError("out of memory"))


def test_a_failed_part_is_let_go_before_the_next_try() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work(start: int, stop: int) -> torch.Tensor:
        assert all(tensor() is None for tensor in held), "its tensors are still there"
        values = torch.zeros(stop - start)
        if stop - start > 2:
            held.append(weakref.ref(values))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return values

    with pytest.warns(UserWarning, match="out of memory with 8 tiles at a time"):
        found = Parts(CPU, together=True).run("tiles", 8, work)
    assert len(held) == 2
    assert len(torch.cat(found)) == 8


def test_what_fits_is_remembered_with_the_model_and_forgotten_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = noise_model()
    alone = Engine(model).parts
    monkeypatch.setattr(Engine, "batches", True)
    assert Engine(model).parts is Engine(model).parts
    assert Engine(model).parts is not alone
    assert Engine(noise_model()).parts is not Engine(model).parts
    Engine(model).parts.most["tiles"] = 2
    tiles = [torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()] * 5
    Engine(model).encode(tiles, [Point(0, 0)] * 5)
    assert model.extractor.batches == [2, 2, 1]
    kept = weakref.ref(model.extractor)
    del model
    gc.collect()
    assert kept() is None


def test_what_is_kept_does_not_depend_on_who_else_uses_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for free in (70, 3):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, n=free: (n * GIB, 80 * GIB))
        found.append(memory_bytes(torch.device("cuda:0"), 1.0))
    assert found == [(20 * GIB, 10 * GIB)] * 2
    assert memory_bytes(CPU, 1.0) == (3 * GIB // 4, GIB // 4)


def test_window_and_batch_in_hand_are_part_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsiseg.inference.job.tile_bytes", lambda *_: 1 << 20)
    options = PredictOptions(overlap_px=32, memory_gib=24 / 1024)  # 18 MiB of features
    grid, model = Grid.at_mpp(Size(640, 640), 0.5, noise_model().info.mpp), noise_model()
    job = prepare(grid, model, options=options)
    assert job.loads is not None
    window = job.layout.window_tiles.shape[1]
    kept = (18 - window - at_a_time(), 18 - window, 18)
    alone, with_batch, whole = (schedule(job.layout, capacity=n).recomputed for n in kept)
    assert job.loads.recomputed == alone > with_batch > whole


class Greedy(NoiseExtractor):
    """Takes a gibibyte a tile while it computes."""

    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        torch.empty(len(images) << 30, dtype=torch.uint8, device=images.device).zero_()
        colour, noise = super().forward(images, places, seed)
        return colour, noise.to(images.device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_that_is_really_too_small(tmp_path: Path) -> None:
    info = noise_model().info
    torch.cuda.set_per_process_memory_fraction(
        6 * 2**30 / torch.cuda.get_device_properties(0).total_memory
    )
    found = []
    try:
        for extractor in (NoiseExtractor(32), Greedy(32)):
            model = Segmenter(extractor, SumHead(32), info)
            model.register_buffer(
                "anchor", torch.zeros(1)
            )  # without weights it would be on the CPU
            options = PredictOptions(overlap_px=32, batch_size=64, precision="fp32")
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                canvas = predict_slide(
                    random_slide(300, 250), model.cuda(), tmp_path / "c", options=options
                )
            found.append(canvas.labels(canvas.grid.box))
            assert [str(w.message)[:4] for w in said] == ["cuda"] * (extractor.__class__ is Greedy)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert canvas.record["timings"]["tiles_at_a_time"] in (2, 4)
    assert (found[0] == found[1]).mean() > 0.999
