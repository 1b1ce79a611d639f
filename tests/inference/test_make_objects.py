"""Post-processing of a canvas, band by band, against that of the whole image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from inference_fakes import CLASSES, MemoryTissue, model_info
from scipy import ndimage

from wsiseg.canvas import Canvas
from wsiseg.classes import Classes, TissueClass
from wsiseg.errors import CanvasError
from wsiseg.geometry import Grid, Size
from wsiseg.inference.blend import Blender
from wsiseg.inference.objects import make_objects, wants_objects
from wsiseg.inference.plan import plan
from wsiseg.objects import ObjectsConfig, clean_labels, separate

Array = npt.NDArray[Any]
THREE = Classes(
    (
        TissueClass("Gland", (200, 0, 0)),
        TissueClass("Other", (9, 9, 9), background=True),
        TissueClass("Tumour", (0, 0, 200)),
    )
)
CONFIG = ObjectsConfig(
    min_area_um2=4,
    max_hole_um2=6,
    border_threshold=0.48,
    min_core_um2=1,
    reach_um=2.2,
    join_um=2.0,
)


def filled(path: Path, labels: Array, border: Array | None, chunk_px: int = 16) -> Canvas:
    size = Size(labels.shape[1], labels.shape[0])
    canvas = Canvas.create(
        path,
        grid=Grid.at_mpp(size, 0.5, 0.5),
        classes=THREE,
        record={},
        chunk_px=chunk_px,
        border=border is not None,
    )
    for row, column in canvas.chunks():
        at = canvas.chunk_box(row, column).slices
        plane = None if border is None else border[at]
        canvas.write_chunk(row, column, labels[at], np.full_like(labels[at], 200), plane)
    return canvas


def example(seed: int, shape: tuple[int, int] = (75, 50)) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    planes = ndimage.gaussian_filter(rng.normal(size=(4, *shape)), (0, 1.5, 1.5))
    border = ndimage.gaussian_filter(rng.random(shape), 1.2)
    return planes.argmax(0).astype(np.uint8), np.round(border * 255).astype(np.uint8)


@pytest.mark.parametrize("band_px", [16, 32, 48, None])
def test_a_canvas_gets_what_the_whole_image_gets(tmp_path: Path, band_px: int | None) -> None:
    labels, border = example(0)
    canvas = filled(tmp_path / "c", labels, border)
    make_objects(canvas, CONFIG, band_px=band_px)
    cleaned = clean_labels(labels, background=(2,), mpp=0.5, config=CONFIG)
    objects = separate(cleaned, border, background=(2,), mpp=0.5, config=CONFIG)
    apart = replace(CONFIG, join_um=0.0)
    assert separate(cleaned, border, background=(2,), mpp=0.5, config=apart).max() > objects.max()
    again = Canvas.open(canvas.path)
    assert again.has_objects
    assert not np.array_equal(cleaned, labels)
    assert np.array_equal(again.labels(again.grid.box), cleaned)
    assert np.array_equal(again.objects(again.grid.box), objects)
    assert again.objects(again.grid.box).dtype == np.int32
    assert (again.confidence(again.grid.box) == 200).all()
    count = {n: len(np.unique(objects[cleaned == v])) for v, n in ((1, "Gland"), (3, "Tumour"))}
    assert again.record["objects"] == count
    colours = again.colours(again.grid.box)
    assert np.array_equal(colours, np.where(objects > 0, objects, -cleaned.astype(int)))


def test_reach_may_be_longer_than_a_band(tmp_path: Path) -> None:
    labels, border = example(5)
    config = ObjectsConfig(border_threshold=0.45, min_core_um2=2, reach_um=20)
    canvas = filled(tmp_path / "c", labels, border, chunk_px=8)
    make_objects(canvas, config)
    objects = separate(labels, border, background=(2,), mpp=0.5, config=config)
    assert np.array_equal(canvas.objects(canvas.grid.box), objects)


def test_without_borders_labels_are_cleaned_and_nothing_else(tmp_path: Path) -> None:
    labels, _ = example(1)
    canvas = filled(tmp_path / "c", labels, None)
    make_objects(canvas, ObjectsConfig())
    assert np.array_equal(canvas.labels(canvas.grid.box), labels)
    make_objects(canvas, CONFIG)
    cleaned = clean_labels(labels, background=(2,), mpp=0.5, config=CONFIG)
    assert np.array_equal(canvas.labels(canvas.grid.box), cleaned)
    assert not canvas.has_objects
    assert canvas.record == {}
    assert np.array_equal(canvas.colours(canvas.grid.box), cleaned)
    with pytest.raises(CanvasError, match="has no objects"):
        canvas.objects(canvas.grid.box)


def test_before_all_that_is_written_it_is_checked_that_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []

    def noted(name: str) -> None:
        plain = getattr(Canvas, name)

        def write(*args: Any, **more: Any) -> None:
            did.append(name)
            plain(*args, **more)

        monkeypatch.setattr(Canvas, name, write)

    canvas = filled(tmp_path / "c", *example(0))
    writers = ("write_labels", "write_objects", "update_record")
    for name in writers:
        noted(name)
    make_objects(canvas, CONFIG, check=lambda: did.append("check"))
    assert set(did[::2]) == {"check"}
    assert set(did[1::2]) == set(writers)


def test_who_wants_objects() -> None:
    info = model_info(96, 32)
    assert not wants_objects(info)
    assert wants_objects(replace(info, border=True))
    assert wants_objects(replace(info, objects=CONFIG))


def test_borders_are_blended_beside_the_classes(tmp_path: Path) -> None:
    width, height, window = 70, 50, 32
    rng = np.random.default_rng(3)
    field = rng.random((3, height + 32, width + 32)).astype(np.float32)
    field[2] += 1  # more than any class: it must not take part in the labels
    field[2] /= 2
    grid = Grid.at_mpp(Size(width, height), 0.5, 0.5)
    layout = plan(grid, None, window_px=window, tile_px=16, overlap_px=16)
    canvas = Canvas.create(
        tmp_path / "c", grid=grid, classes=CLASSES, record={}, chunk_px=40, border=True
    )
    mask = np.ones((height, width), bool)
    mask[:, :9] = False
    blender = Blender(layout, 2, canvas, tissue=MemoryTissue(mask))
    for place in layout.places(0, len(layout.windows)):
        cut = field[:, place.y : place.y + window, place.x : place.x + window]
        blender.add(torch.from_numpy(cut[None].copy()), [place])
    blender.finish()
    here = field[:, :height, :width]
    assert np.array_equal(canvas.border(grid.box), np.round(here[2] * 255).astype(int) * mask)
    assert np.array_equal(canvas.labels(grid.box), (here[:2].argmax(0) + 1) * mask)
    best = np.round(here[:2].max(0) * 255).astype(int)
    assert np.array_equal(canvas.confidence(grid.box), best * mask)
