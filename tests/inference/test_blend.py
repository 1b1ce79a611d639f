"""Blending: constants, fields, tissue, spilling."""

from pathlib import Path

import numpy as np
import pytest
import torch
from inference_fakes import CLASSES, MemoryTissue

from wsiseg.canvas import Canvas
from wsiseg.classes import Classes, TissueClass
from wsiseg.errors import CanvasError
from wsiseg.geometry import Grid, Size
from wsiseg.inference.blend import Accumulators, Blender, window_weight
from wsiseg.inference.plan import Plan, plan

WINDOW, TILE, CHUNK = 48, 16, 40
THREE = Classes(tuple(TissueClass(n, (0, 0, k)) for k, n in enumerate("abc")))


def layout_of(
    width: int, height: int, overlap: int = 16, tissue: MemoryTissue | None = None
) -> Plan:
    grid = Grid.at_mpp(Size(width, height), 0.5, 0.5)
    return plan(grid, tissue, window_px=WINDOW, tile_px=TILE, overlap_px=overlap)


class Keeping(Blender):
    """Keeps the probabilities of finished chunks too."""

    def start(self, classes: int, width: int, height: int) -> None:
        self.blended = np.full((classes, height, width), np.nan)
        self.written: list[tuple[int, int]] = []

    def write(self, row: int, column: int, state: np.ndarray) -> None:
        box = self._canvas.chunk_box(row, column)
        self.written.append((row, column))
        self.blended[(slice(None), *box.slices)] = state[:-1]
        super().write(row, column, state)


def run(
    path: Path,
    layout: Plan,
    field: np.ndarray,
    *,
    order: np.ndarray | None = None,
    tissue: MemoryTissue | None = None,
    memory: int = 1 << 30,
) -> tuple[Canvas, Keeping]:
    """Blend windows that all predict the same field (C, H, W) of the plane."""
    width, height = layout.grid.size
    classes = CLASSES if len(field) == 2 else THREE
    canvas = Canvas.create(path, grid=layout.grid, classes=classes, record={}, chunk_px=CHUNK)
    blender = Keeping(layout, len(field), canvas, tissue=tissue, memory_bytes=memory)
    blender.start(len(field), width, height)
    padded = np.pad(field, ((0, 0), (0, WINDOW), (0, WINDOW)), mode="edge")
    for k in np.arange(len(layout.windows)) if order is None else order:
        (place,) = layout.places(int(k), int(k) + 1)
        cut = padded[:, place.y : place.y + WINDOW, place.x : place.x + WINDOW]
        blender.add(torch.from_numpy(cut[None].astype(np.float32)), [place])
    blender.finish()
    return canvas, blender


def random_field(classes: int, width: int, height: int) -> np.ndarray:
    values = np.random.default_rng(3).random((classes, height, width)) + 0.01
    return values / values.sum(axis=0)


@pytest.mark.parametrize(("width", "height"), [(47, 48), (49, 100), (163, 131), (20, 7)])
@pytest.mark.parametrize("overlap", [0, 16, 21, 40])
def test_a_field_of_the_plane_comes_back_unchanged(
    tmp_path: Path, width: int, height: int, overlap: int
) -> None:
    field = random_field(3, width, height)
    canvas, blender = run(tmp_path / "c", layout_of(width, height, overlap), field)
    assert (blender.blended == field.astype(np.float32)).all()
    labels = canvas.labels(canvas.grid.box)
    top = np.sort(field, axis=0)
    clear = top[-1] - top[-2] > 1e-5
    assert (labels == field.argmax(axis=0) + 1)[clear].all()
    confidence = canvas.confidence(canvas.grid.box).astype(int)
    assert np.abs(confidence - field.max(axis=0) * 255).max() <= 0.501
    assert len(blender.written) == len(set(blender.written)) == len(list(canvas.chunks()))
    assert all(canvas.is_done(*key) for key in canvas.chunks())


def test_a_constant_field_blends_to_exactly_a_constant(tmp_path: Path) -> None:
    field = np.empty((2, 131, 163))
    field[0], field[1] = 0.3, 0.7
    canvas, blender = run(tmp_path / "c", layout_of(163, 131, 21), field)
    assert np.unique(canvas.labels(canvas.grid.box)).tolist() == [2]
    confidence = np.unique(canvas.confidence(canvas.grid.box)).tolist()
    assert confidence in ([178], [179]), "0.7 x 255 is a half: one side of it, everywhere"
    assert (blender.blended[1] == np.float32(0.7)).all()


def test_windows_that_differ_are_averaged_by_weight(tmp_path: Path) -> None:
    layout = layout_of(WINDOW + 16, WINDOW, overlap=32)
    assert layout.windows.tolist() == [[0, 0], [16, 0]]
    canvas = Canvas.create(
        tmp_path / "c", grid=layout.grid, classes=CLASSES, record={}, chunk_px=CHUNK
    )
    blender = Keeping(layout, 2, canvas)
    blender.start(2, WINDOW + 16, WINDOW)
    first = torch.zeros(1, 2, WINDOW, WINDOW)
    first[:, 0] = 1
    blender.add(torch.cat((first, 1 - first)), layout.places(0, 2))
    blender.finish()
    x = np.arange(16, WINDOW)
    weight = window_weight(WINDOW)[WINDOW // 2]
    expected = weight[x] / (weight[x] + weight[x - 16])
    assert np.abs(blender.blended[0, :, 16:WINDOW] - expected).max() < 1e-5
    assert (blender.blended[0, :, :16] == 1).all()
    assert (blender.blended[0, :, WINDOW:] == 0).all()


def test_weight_is_smooth_symmetric_and_never_zero() -> None:
    weight = window_weight(768)
    assert weight.dtype == np.float32
    assert (weight == weight.T).all()
    assert np.allclose(weight, weight[::-1, ::-1], rtol=1e-5)
    assert weight.min() > 0
    assert weight[384, 0] < 1e-5  # the step that a window that begins makes
    assert weight.max() <= 1
    assert np.abs(np.diff(weight, axis=0)).max() < 0.005


@pytest.mark.parametrize("memory", [1, 100_000])
def test_spilling_changes_nothing(tmp_path: Path, memory: int) -> None:
    layout = layout_of(300, 280)
    field = random_field(3, 300, 280)
    plain, free = run(tmp_path / "a", layout, field)
    spilt, tight = run(tmp_path / "b", layout, field, memory=memory)
    assert free.spilled == 0
    assert tight.spilled > 0
    assert (free.blended == tight.blended).all()
    assert (plain.labels(plain.grid.box) == spilt.labels(spilt.grid.box)).all()
    assert (plain.confidence(plain.grid.box) == spilt.confidence(spilt.grid.box)).all()
    assert list((tmp_path / "b").glob("spill*")) == []


def test_accumulators_keep_their_bound(tmp_path: Path) -> None:
    store = Accumulators(tmp_path / "spill", memory_bytes=1000)
    for k in range(10):
        store.get((0, k), (1, 10, 10))[...] = k
        assert sum(a.nbytes for a in store._live.values()) <= 1000
    assert len(list((tmp_path / "spill").iterdir())) == 8
    for k in range(10):
        assert (store.get((0, k), (1, 10, 10)) == k).all()
        assert (store.pop((0, k)) == k).all()
    assert list((tmp_path / "spill").iterdir()) == []
    store.close()
    assert not (tmp_path / "spill").exists()


def test_any_order_of_windows_gives_the_weighted_mean(tmp_path: Path) -> None:
    layout = layout_of(163, 131, overlap=29)
    random = np.random.default_rng(1)
    values = random.dirichlet((1, 1), (len(layout.windows), WINDOW, WINDOW)).astype(np.float32)
    values = values.transpose(0, 3, 1, 2)
    total, weights = np.zeros((2, 131, 163)), np.zeros((131, 163))
    weight = window_weight(WINDOW).astype(np.float64)
    for (x, y), p in zip(layout.windows, values, strict=True):
        total[:, y : y + WINDOW, x : x + WINDOW] += weight * p
        weights[y : y + WINDOW, x : x + WINDOW] += weight
    for name, order in (("a", np.arange(len(values))), ("b", random.permutation(len(values)))):
        canvas = Canvas.create(
            tmp_path / name, grid=layout.grid, classes=CLASSES, record={}, chunk_px=CHUNK
        )
        blender = Keeping(layout, 2, canvas)
        blender.start(2, 163, 131)
        for k in order:
            blender.add(torch.from_numpy(values[k : k + 1]), layout.places(int(k), int(k) + 1))
        blender.finish()
        assert np.abs(blender.blended - total / weights).max() <= 1e-6


def test_outside_tissue_and_unseen_pixels_are_zero(tmp_path: Path) -> None:
    mask = np.zeros((200, 210), bool)
    mask[10:30, 60:75] = True
    tissue = MemoryTissue(mask)
    layout = layout_of(210, 200, tissue=tissue)
    canvas, _ = run(tmp_path / "c", layout, random_field(2, 210, 200), tissue=tissue)
    assert ((canvas.labels(canvas.grid.box) > 0) == mask).all()
    assert ((canvas.confidence(canvas.grid.box) > 0) == mask).all()


def test_a_missing_window_is_an_error_and_leaves_no_files(tmp_path: Path) -> None:
    layout = layout_of(300, 280)
    with pytest.raises(CanvasError, match="lack windows"):
        run(
            tmp_path / "c",
            layout,
            random_field(2, 300, 280),
            order=np.arange(len(layout.windows) - 1),
            memory=1,
        )
    assert not list((tmp_path / "c").glob("spill*"))


@pytest.mark.parametrize("limit", [0, 1000])
def test_a_disk_that_takes_no_unfinished_chunk(tmp_path: Path, limit: int) -> None:
    resource = pytest.importorskip("resource")
    store = Accumulators(tmp_path / "spill", memory_bytes=1)
    store.get((0, 0), (3, 64, 64))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            CanvasError, match=r"spill: cannot write \(File too large\); check free"
        ):
            store.get((0, 1), (3, 64, 64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [2, 7, 254])
def test_labels_are_the_first_of_the_largest(tmp_path: Path, count: int) -> None:
    classes = Classes(tuple(TissueClass(f"{n}", (0, 0, n)) for n in range(count)))
    layout = layout_of(64, 50)
    rng = np.random.default_rng(count)
    canvas = Canvas.create(
        tmp_path / "c", grid=layout.grid, classes=classes, record={}, chunk_px=CHUNK
    )
    blender = Blender(layout, count, canvas)
    means = rng.integers(0, 5, (count, CHUNK, CHUNK)).astype(np.float32) / 4  # many are alike
    blender.write(0, 0, np.concatenate([means, np.ones((1, CHUNK, CHUNK), np.float32)]))
    blender.close()
    labels = canvas.labels(canvas.chunk_box(0, 0))
    assert np.array_equal(labels, np.argmax(means, axis=0) + 1)
