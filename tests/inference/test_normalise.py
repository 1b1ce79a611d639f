"""Slides normalised to a model's stains: which tiles, what is recorded, independence of batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inference_fakes import MemorySlide, MemoryTissue, noise_model, stain_model

from wsiseg.config import from_mapping
from wsiseg.geometry import Grid, Point, Size
from wsiseg.inference.normalise import SAMPLE_PX, SAMPLES, sample_places, slide_stains
from wsiseg.inference.predict import PredictOptions, predict_slide
from wsiseg.models.segmenter import Segmenter
from wsiseg.slides.phantom import render_phantom
from wsiseg.stain import StainBasis, apply_matrix, estimate_stains, normalising_matrix

OPTIONS = PredictOptions(overlap_px=32, batch_size=4, workers=2)
TARGET = from_mapping(
    StainBasis,
    {
        "vectors": [[0.448685, 0.853404, 0.265299], [0.067783, 0.957395, 0.280714]],
        "maxima": [1.96, 0.82],
    },
)


@pytest.fixture(scope="module")
def slide() -> MemorySlide:
    size = Size(560, 420)
    return MemorySlide(render_phantom(Grid.at_mpp(size, 0.5, 0.5).box, size, mpp=0.5, seed=3)[0])


def fresh(slide: MemorySlide) -> MemorySlide:
    return MemorySlide(slide.pixels)


def with_target(model: Segmenter, target: StainBasis | None = TARGET) -> Segmenter:
    model.info = replace(model.info, stain_target=target)
    return model


def planes(canvas: Any) -> tuple[np.ndarray, np.ndarray]:
    return canvas.labels(canvas.grid.box), canvas.confidence(canvas.grid.box)


@pytest.mark.parametrize("make", [noise_model, stain_model])
def test_a_normalised_run_is_the_run_on_the_normalised_slide(
    tmp_path: Path, slide: MemorySlide, make: Any
) -> None:
    canvas = predict_slide(fresh(slide), with_target(make()), tmp_path / "a", options=OPTIONS)
    source = estimate_stains(slide.pixels)
    assert source is not None
    parameters = canvas.record["parameters"]
    found = from_mapping(StainBasis, parameters["stain_source"])
    assert np.abs(np.subtract(found.vectors, source.vectors)).max() < 0.03
    matrix = np.array(parameters["stain_matrix"])
    assert (matrix == normalising_matrix(found, TARGET)).all()
    ready = MemorySlide(apply_matrix(slide.pixels, matrix))
    plain = predict_slide(ready, make(), tmp_path / "b", options=OPTIONS)
    for own, expected in zip(planes(canvas), planes(plain), strict=True):
        assert (own == expected).all()
    raw = predict_slide(fresh(slide), make(), tmp_path / "c", options=OPTIONS)
    assert (planes(raw)[1] != planes(canvas)[1]).any()


def test_it_does_not_depend_on_batch_or_workers(tmp_path: Path, slide: MemorySlide) -> None:
    results = []
    for k, options in enumerate(
        [
            replace(OPTIONS, batch_size=1, workers=1),
            OPTIONS,
            replace(OPTIONS, batch_size=50, workers=4),
        ]
    ):
        model = with_target(stain_model())
        canvas = predict_slide(fresh(slide), model, tmp_path / str(k), options=options)
        results.append((*planes(canvas), canvas.record["parameters"]["stain_matrix"]))
    assert len(np.unique(results[0][0])) == 2
    for labels, confidence, matrix in results[1:]:
        assert labels.tobytes() == results[0][0].tobytes()
        assert confidence.tobytes() == results[0][1].tobytes()
        assert matrix == results[0][2]


def test_a_model_without_target_reads_and_records_as_before(
    tmp_path: Path, slide: MemorySlide
) -> None:
    own = fresh(slide)
    canvas = predict_slide(own, stain_model(), tmp_path / "c", options=OPTIONS)
    assert len(own.reads) == canvas.record["timings"]["tiles"]
    assert not {"stain_source", "stain_matrix"} & set(canvas.record["parameters"])


def test_too_little_tissue_is_left_as_it_is_and_said(tmp_path: Path) -> None:
    glass = MemorySlide(np.full((300, 300, 3), 246, np.uint8))
    glass.pixels[100:120, 100:120] = (170, 90, 150)
    canvas = predict_slide(glass, with_target(stain_model()), tmp_path / "a", options=OPTIONS)
    assert canvas.record["parameters"]["stain_source"] is None
    assert canvas.record["parameters"]["stain_matrix"] is None
    plain = predict_slide(glass, stain_model(), tmp_path / "b", options=OPTIONS)
    assert (planes(plain)[1] == planes(canvas)[1]).all()


def test_only_tissue_gives_the_stains(slide: MemorySlide) -> None:
    """A label or another stain outside the mask takes no part."""
    pixels = np.concatenate([slide.pixels, slide.pixels[:, ::-1, [0, 1, 1]]])
    tissue = MemoryTissue(np.zeros(pixels.shape[:2], bool))
    tissue.mask[: len(slide.pixels)] = True
    both = MemorySlide(pixels)
    within = slide_stains(both, both.grid(0.5), thumbnail=pixels, tissue=tissue)
    alone = slide_stains(slide, slide.grid(0.5), thumbnail=slide.pixels, tissue=None)
    assert within is not None
    assert alone is not None
    assert np.abs(np.subtract(within.vectors, alone.vectors)).max() < 0.01
    assert slide_stains(both, both.grid(0.5), thumbnail=pixels, tissue=None) != alone


def test_the_tiles_looked_at_are_few_and_spread() -> None:
    grid = Grid.at_mpp(Size(256 * 60, 256 * 40), 0.5, 0.5)
    thumbnail = np.full((80, 120, 3), 245, np.uint8)
    assert sample_places(grid, thumbnail, tissue=None) == []
    thumbnail[20:60, 30:90] = (160, 80, 150)
    places = sample_places(grid, thumbnail, tissue=None)
    assert len(places) == len(set(places)) == SAMPLES
    columns, rows = (np.array([p[k] for p in places]) // SAMPLE_PX for k in (0, 1))
    assert (columns.min() >= 15) & (columns.max() < 45)
    assert (rows.min() >= 10) & (rows.max() < 30)
    assert len(set(rows)) == 20
    assert len(set(columns)) > 12
    small = Grid.at_mpp(Size(300, 200), 0.5, 0.5)
    stain = np.full((20, 30, 3), (160, 80, 150), np.uint8)
    assert sample_places(small, stain, tissue=None) == [Point(0, 0), Point(256, 0)]
