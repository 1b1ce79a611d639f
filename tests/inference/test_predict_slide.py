"""A slide in memory through small networks: sharing, independence of batches, records, errors."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from inference_fakes import MemorySlide, MemoryTissue, noise_model, random_slide, stain_model
from torch import Tensor

from wsiseg.canvas import Canvas
from wsiseg.errors import CanvasError, ModelError, SlideReadError, UsageError
from wsiseg.geometry import Box, Grid, Point, Size
from wsiseg.inference.engine import Engine, resolve_precision
from wsiseg.inference.estimate import estimate, measure_speed
from wsiseg.inference.predict import PredictOptions, predict_slide, prepare
from wsiseg.models.base import Features, to_tensor
from wsiseg.models.segmenter import Segmenter
from wsiseg.models.views import ViewedSegmenter

OPTIONS = PredictOptions(overlap_px=32, batch_size=4, workers=2)


def labels(canvas: Canvas) -> np.ndarray:
    return canvas.labels(canvas.grid.box)


def no_canvas(path: Path) -> bool:
    return not path.exists() and list(path.parent.iterdir()) == []


def test_each_distinct_tile_is_read_and_encoded_exactly_once(tmp_path: Path) -> None:
    slide, model = random_slide(300, 250), noise_model()
    canvas = predict_slide(slide, model, tmp_path / "c", options=OPTIONS)
    seen: Any = model.extractor.seen
    assert len(seen) == len(set(seen)) == canvas.record["timings"]["tiles_distinct"]
    assert sorted(slide.reads) == sorted(seen)
    layout = prepare(slide.grid(0.5), model, options=OPTIONS).layout
    assert {tuple(t) for t in layout.tiles.tolist()} == set(seen)


def test_a_cpu_computes_each_tile_and_window_by_itself_and_a_gpu_the_batch(
    tmp_path: Path,
) -> None:
    slide, model = random_slide(300, 250), noise_model()
    calls: list[int] = []
    predict_slide(
        slide,
        model,
        tmp_path / "c",
        options=replace(OPTIONS, batch_size=20),
        progress=lambda done, total: calls.append(done),
    )
    batches: Any = model.extractor.batches
    assert set(batches) == {1}, "kernels round differently at different batch sizes"
    assert {b - a for a, b in pairwise(calls[:-1])} == {20}, "batches are full"
    batches.clear()
    features = FakeGpu(model).encode([slide.pixels[:32, :32]] * 5, [Point(0, 0)] * 5)
    assert batches == [5]
    assert features[0].shape == (5, 3, 4, 4)


class FakeGpu(Engine):
    """Computes on the CPU what a GPU would compute at a time."""

    batches = True


def slow_probabilities(slide: MemorySlide, model: Segmenter, windows: np.ndarray) -> np.ndarray:
    """Each window by itself, then the weighted mean over all."""
    from wsiseg.inference.blend import window_weight

    side = model.info.window_px
    height, width = slide.pixels.shape[:2]
    weight = window_weight(side).astype(np.float64)
    total, sums = (
        np.zeros((2, height + side, width + side)),
        np.zeros((height + side, width + side)),
    )
    for x, y in windows.tolist():
        image = slide.read(Box(x, y, side, side), slide.grid(0.5))
        with torch.no_grad():
            p = model.probabilities(to_tensor([image]), [Point(x, y)], seed=7)[0].double().numpy()
        total[:, y : y + side, x : x + side] += weight * p
        sums[y : y + side, x : x + side] += weight
    return total[:, :height, :width] / sums[:height, :width]


@pytest.mark.parametrize(
    ("width", "height", "overlap"),
    [(300, 250, 32), (97, 96, 32), (95, 130, 64), (40, 30, 32), (200, 150, 41), (150, 200, 0)],
)
def test_the_result_is_that_of_windows_by_themselves(
    tmp_path: Path, width: int, height: int, overlap: int
) -> None:
    slide, model = random_slide(width, height), noise_model()
    options = PredictOptions(overlap_px=overlap, batch_size=5, workers=2, seed=7)
    canvas = predict_slide(slide, model, tmp_path / "c", options=options)
    layout = prepare(slide.grid(0.5), model, options=options).layout
    expected = slow_probabilities(slide, model, layout.windows)
    clear = np.abs(expected[0] - expected[1]) > 1e-5
    assert clear.mean() > 0.99
    assert (labels(canvas) == expected.argmax(axis=0) + 1)[clear].all()
    confidence = canvas.confidence(canvas.grid.box).astype(int)
    assert np.abs(confidence - expected.max(axis=0) * 255).max() < 0.51
    assert canvas.areas_mm2()["nuclei"] == pytest.approx((labels(canvas) == 2).sum() * 0.25e-6)


@pytest.mark.parametrize("make", [noise_model, stain_model])
def test_labels_do_not_depend_on_batch_workers_or_memory(tmp_path: Path, make: Any) -> None:
    slide = random_slide(300, 250, seed=2)
    results = []
    for k, options in enumerate(
        [
            replace(OPTIONS, batch_size=1, workers=1),
            replace(OPTIONS, batch_size=4),
            replace(OPTIONS, batch_size=16, workers=4),
            replace(OPTIONS, batch_size=200, memory_gib=0.01),
        ]
    ):
        canvas = predict_slide(slide, make(), tmp_path / str(k), options=options)
        results.append((labels(canvas), canvas.confidence(canvas.grid.box)))
    assert len(np.unique(results[0][0])) == 2
    for other in results[1:]:
        assert (other[0] == results[0][0]).all()
        assert (other[1] == results[0][1]).all()


def test_short_memory_encodes_again_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = random_slide(500, 450)
    free = predict_slide(slide, noise_model(), tmp_path / "a", options=OPTIONS)
    monkeypatch.setattr("wsiseg.inference.job.GIB", 1 << 11)  # one KiB: 256 bytes a tile
    model = noise_model()
    tight = predict_slide(slide, model, tmp_path / "b", options=replace(OPTIONS, memory_gib=1.0))
    timings = tight.record["timings"]
    seen: Any = model.extractor.seen
    assert timings["tiles_recomputed"] == len(seen) - len(set(seen)) > 0
    assert timings["tiles"] == len(seen)
    assert free.record["timings"]["tiles_recomputed"] == 0
    assert (labels(free) == labels(tight)).all()


def features_by_place(model: Segmenter, slide: MemorySlide, **options: Any) -> dict[Point, Any]:
    found: dict[Point, Any] = {}
    plain = model.tile_features

    def spy(tiles: Tensor, places: Any, seed: int) -> Features:
        maps = plain(tiles, places, seed)
        for k, place in enumerate(places):
            found[place] = [m[k].clone() for m in maps]
        return maps

    model.tile_features = spy  # type: ignore[method-assign]
    path = slide.path.with_suffix(".canvas")
    predict_slide(slide, model, path, options=PredictOptions(**options)).remove()
    return found


def test_features_and_noise_belong_to_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    slide = random_slide(300, 250)
    base = features_by_place(noise_model(), slide, overlap_px=32, batch_size=1, seed=5)
    for overlap, batch in ((32, 4), (32, 16), (64, 7), (0, 3), (16, 4)):
        other = features_by_place(
            noise_model(), slide, overlap_px=overlap, batch_size=batch, seed=5
        )
        common = base.keys() & other.keys()
        assert len(common) >= 4
        assert all(
            torch.equal(a, b) for p in common for a, b in zip(base[p], other[p], strict=True)
        )
    changed = features_by_place(noise_model(), slide, overlap_px=32, batch_size=1, seed=6)
    assert not torch.equal(base[Point(0, 0)][1], changed[Point(0, 0)][1])


def test_the_record_says_what_was_done(tmp_path: Path) -> None:
    slide, model = random_slide(300, 250), stain_model()
    calls: list[tuple[int, int]] = []
    mask = np.zeros((250, 300), bool)
    mask[20:60, 30:90] = True
    canvas = predict_slide(
        slide,
        model,
        tmp_path / "c",
        options=OPTIONS,
        tissue=MemoryTissue(mask),
        progress=lambda done, total: calls.append((done, total)),
    )
    record = Canvas.open(tmp_path / "c").record
    assert record == json.loads(json.dumps(canvas.record))
    assert record["status"] == "ok"
    assert record["slide"] == {
        "path": "memory.svs",
        "quickhash": "0" * 64,
        "mpp": 0.5,
        "mpp_source": "option",
        "vendor": "test",
        "backend": "memory",
        "frame": "qupath",
        "bounds": None,
        "size": [300, 250],
    }
    assert record["model"] == {"name": "fake", "sha256": "0" * 64, "licence": "none"}
    parameters = record["parameters"]
    assert parameters["overlap_px"] == 32
    assert parameters["batch_size"] == 4
    assert parameters["precision"] == "fp32"
    assert parameters["device"] == "cpu"
    assert parameters["seed"] == 0
    assert parameters["tissue"] == "mask"
    assert set(record["versions"]) == {"wsiseg", "python", "torch", "numpy"}
    timings = record["timings"]
    assert timings["windows"] == len(
        prepare(slide.grid(0.5), model, options=OPTIONS, tissue=MemoryTissue(mask)).layout.windows
    )
    parts = sum(timings[k] for k in ("read", "encode", "head", "blend"))
    assert 0 < parts <= timings["total"]
    assert timings["tiles_per_s"] > 0
    assert calls[0] == (0, timings["tiles"])
    assert calls[-1] == (timings["tiles"], timings["tiles"])
    assert [c[0] for c in calls] == sorted({c[0] for c in calls})
    assert ((labels(canvas) > 0) == mask).all()
    thumbnail, tissue = canvas.image("thumbnail"), canvas.image("tissue")
    assert thumbnail is not None
    assert (thumbnail == slide.pixels).all()
    assert tissue is not None
    assert (tissue == mask).all()


def test_no_tissue_is_a_result(tmp_path: Path) -> None:
    slide = random_slide(300, 250)
    tissue = MemoryTissue(np.zeros((250, 300), bool))
    model = noise_model()
    canvas = predict_slide(slide, model, tmp_path / "c", options=OPTIONS, tissue=tissue)
    assert canvas.record["status"] == "no tissue"
    assert canvas.record["timings"]["tiles"] == 0
    assert not labels(canvas).any()
    assert slide.reads == []


class NanModel(Segmenter):
    def window_logits(self, features: Features) -> Tensor:
        logits = super().window_logits(features)
        logits[-1, 1, 5, 5] = float("nan")
        return logits


class NanBorder(Segmenter):
    """As if only the last map, where a border would be, had a value that is none."""

    def window_probabilities(self, features: Features) -> Tensor:
        found = super().window_probabilities(features)
        found[-1, -1, 5, 5] = float("nan")
        return found


class TornSlide(MemorySlide):
    def read(self, box: Box, grid: Grid) -> np.ndarray:
        if box.y > 100:
            raise SlideReadError("torn.svs: the tile at (64, 128) cannot be read")
        return super().read(box, grid)


@pytest.mark.parametrize("kind", [NanModel, NanBorder])
def test_values_that_are_no_numbers_end_the_run_without_a_canvas(
    kind: type[Segmenter], tmp_path: Path
) -> None:
    model = stain_model()
    broken = kind(model.extractor, model.head, model.info)
    with pytest.raises(ModelError, match=r"model fake .* no numbers in the window at \(0, 0\)"):
        predict_slide(random_slide(300, 250), broken, tmp_path / "c", options=OPTIONS)
    assert no_canvas(tmp_path / "c")


def test_a_damaged_slide_ends_the_run_without_a_canvas(tmp_path: Path) -> None:
    slide = TornSlide(random_slide(300, 250).pixels)
    with pytest.raises(SlideReadError, match="cannot be read"):
        predict_slide(slide, stain_model(), tmp_path / "c", options=OPTIONS)
    assert no_canvas(tmp_path / "c")


def test_an_interruption_ends_the_run_without_a_canvas(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_slide(
            random_slide(300, 250),
            stain_model(),
            tmp_path / "c",
            options=OPTIONS,
            progress=interrupt,
        )
    assert no_canvas(tmp_path / "c")


def test_only_a_canvas_is_replaced(tmp_path: Path) -> None:
    slide = random_slide(100, 100)
    predict_slide(slide, stain_model(), tmp_path / "c", options=OPTIONS)
    predict_slide(slide, stain_model(), tmp_path / "c", options=OPTIONS)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("precious")
    for name in ("work", "work/thesis.txt"):
        with pytest.raises(CanvasError, match="exists and is not a canvas"):
            predict_slide(slide, stain_model(), tmp_path / name, options=OPTIONS)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "precious"
    zarr.open_group(tmp_path / "image.zarr", mode="w").create_array("0", shape=(4, 4), dtype="u1")
    for name in ("image.zarr", "image.zarr/0"):
        with pytest.raises(CanvasError, match="exists and is not a canvas"):
            predict_slide(slide, stain_model(), tmp_path / name, options=OPTIONS)
    assert (tmp_path / "image.zarr" / "0").is_dir()
    (tmp_path / "c" / "zarr.json").write_text('{"attributes": {"ws')
    predict_slide(slide, stain_model(), tmp_path / "c", options=OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"workers": 0}, "0 workers"),
        ({"memory_gib": 0.0}, "memory of 0.0 GiB"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PredictOptions(**options)


def test_precision_by_device() -> None:
    cpu, mps = torch.device("cpu"), torch.device("mps")
    assert resolve_precision("auto", cpu) == resolve_precision("auto", mps) == "fp32"
    assert resolve_precision("bf16", cpu) == "bf16"
    with pytest.raises(UsageError, match="'fp16' is not available on cpu; take auto, fp32, bf16"):
        resolve_precision("fp16", cpu)
    with pytest.raises(UsageError, match="'bf16' is not available on mps; take auto, fp32"):
        resolve_precision("bf16", mps)
    with pytest.raises(UsageError, match="'double'"):
        resolve_precision("double", cpu)
    assert resolve_precision("bf16", torch.device("cuda")) == "bf16"


def test_bf16_on_a_cpu_runs_in_bf16(tmp_path: Path) -> None:
    slide = random_slide(200, 150)
    exact = predict_slide(slide, stain_model(), tmp_path / "a", options=OPTIONS)
    half = predict_slide(
        slide, stain_model(), tmp_path / "b", options=replace(OPTIONS, precision="bf16")
    )
    assert half.record["parameters"]["precision"] == "bf16"
    assert (labels(exact) == labels(half)).mean() > 0.95
    assert (exact.confidence(exact.grid.box) != half.confidence(half.grid.box)).any()


def test_tta_is_the_mean_of_the_views_of_every_window(tmp_path: Path) -> None:
    slide, model = random_slide(300, 250), stain_model()
    options = replace(OPTIONS, tta=True)
    canvas = predict_slide(slide, model, tmp_path / "c", options=options)
    assert canvas.record["parameters"]["tta"] is True
    windows = prepare(slide.grid(0.5), model, options=options).layout.windows
    expected = slow_probabilities(slide, ViewedSegmenter(model), windows)
    sure = np.abs(expected[0] - expected[1]) > 1e-4
    assert np.array_equal(labels(canvas)[sure], expected.argmax(0)[sure] + 1)
    fewer = prepare(slide.grid(0.5), model, options=replace(OPTIONS, memory_gib=0.01)).loads
    more = prepare(slide.grid(0.5), model, options=replace(options, memory_gib=0.01)).loads
    assert fewer is not None
    assert more is not None
    assert len(more.tiles) >= len(fewer.tiles)  # eight times the features of a tile


def test_the_estimate_counts_what_the_run_does(tmp_path: Path) -> None:
    slide, model = random_slide(300, 250), noise_model()
    job = prepare(slide.grid(0.5), model, options=OPTIONS)
    speed = measure_speed(Engine(model))
    cost = estimate(job, speed)
    timings = predict_slide(slide, model, tmp_path / "c", options=OPTIONS).record["timings"]
    assert (cost.windows, cost.tiles) == (timings["windows"], timings["tiles"])
    assert cost.tiles_without_sharing == 9 * cost.windows
    assert cost.memory_gib > 0
    assert cost.seconds == pytest.approx(cost.tiles * speed.tile_s + cost.windows * speed.window_s)
    assert speed.tile_s > 0
    assert speed.window_s > 0


def test_windows_overlap_by_a_third_unless_told() -> None:
    assert [PredictOptions().overlap_of(window) for window in (768, 256, 96)] == [256, 85, 32]
    assert PredictOptions(overlap_px=0).overlap_of(768) == 0
    layout = prepare(Grid.at_mpp(Size(300, 200), 0.5, 0.5), noise_model(), options=PredictOptions())
    assert layout.layout.overlap_px == noise_model().info.window_px // 3
