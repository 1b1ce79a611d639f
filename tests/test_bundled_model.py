"""The models in the box: labels that do not depend on batches, quality on real glands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsiseg import load_model, open_slide, predict_slide
from wsiseg.datasets.glas import GlaS
from wsiseg.geometry import Size
from wsiseg.inference.predict import PredictOptions
from wsiseg.models.segmenter import Segmenter
from wsiseg.slides.phantom import write_phantom
from wsiseg.training.evaluate import evaluate


@pytest.fixture(scope="module")
def model() -> Segmenter:
    return load_model("glas-small", device="cpu")


def test_labels_do_not_depend_on_the_batch_size(model: Segmenter, tmp_path: Path) -> None:
    write_phantom(tmp_path / "p.tif", Size(1700, 1600), seed=3)
    planes = []
    for batch in (1, 4, 16):
        with open_slide(tmp_path / "p.tif") as slide:
            canvas = predict_slide(
                slide,
                model,
                tmp_path / f"{batch}.canvas",
                options=PredictOptions(batch_size=batch),
            )
        box = canvas.grid.box
        planes.append(np.stack([canvas.labels(box), canvas.confidence(box)]))
    assert planes[0][0].max() == 2
    assert np.array_equal(planes[0], planes[1])
    assert np.array_equal(planes[0], planes[2])


@pytest.mark.parametrize("name", ["glas-small", "glas-lite"])
def test_it_segments_real_glands(name: str, shared_data: Path) -> None:
    # A part of testA, to see that the file is what the card says, not to choose anything.
    data = GlaS(shared_data / "glas", "testA")
    model = load_model(name, device="cpu")
    result = evaluate(model, data, indices=range(0, 60, 6))
    stated = model.info.card["metrics"]["glas testA"]["dice"]
    assert result.pixel["dice"] > stated - 0.06
