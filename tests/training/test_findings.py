"""Labels and objects of a prediction with and without a model's post-processing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_borders import CLASSES, CNN, Touching

from wsiseg.classes import IGNORE, Classes, TissueClass
from wsiseg.datasets.base import LabelledImage
from wsiseg.errors import UsageError
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.models.segmenter import ModelInfo
from wsiseg.objects import ObjectsConfig
from wsiseg.training.borders import border_band
from wsiseg.training.evaluate import Measuring, evaluate
from wsiseg.training.findings import filled, found_labels, found_objects, without_small
from wsiseg.training.sliding import Prediction

OBJECTS = ObjectsConfig(min_area_um2=30.0, max_hole_um2=10.0, min_core_um2=4.0, reach_um=8.0)
INFO = ModelInfo("m", "0", CLASSES, 0.5, 32, 32, border=True, objects=OBJECTS)


def prediction() -> Prediction:
    """The truth of `Touching` with a hole, a speck and ideal borders."""
    item = Touching()[0]
    gland = item.mask == 1
    gland[20:22, 20:22] = False
    gland[2:4, 2:4] = True
    assert item.instances is not None
    border = border_band(item.instances, 3.0).astype(np.float32)
    maps = np.stack([~gland, gland]).astype(np.float32) * 0.8 + 0.1
    return Prediction(maps, None, border)


def test_labels_lose_holes_and_specks_unless_raw() -> None:
    item, found = Touching()[0], prediction()
    clean = found_labels(found, INFO, mpp=0.5)
    assert np.array_equal(clean == 1, item.mask == 1)
    raw = found_labels(found, INFO, mpp=0.5, raw=True)
    assert raw[2, 2] == 1
    assert raw[20, 20] == 0


def test_touching_objects_come_apart_by_their_borders_only() -> None:
    item, found = Touching()[0], prediction()
    labels = found_labels(found, INFO, mpp=0.5)
    ignored = item.mask == 255
    parted = found_objects(labels, found, INFO, mpp=0.5, ignored=ignored)
    assert parted.max() == 2
    assert np.array_equal(parted > 0, labels == 1)
    assert item.instances is not None
    assert all(len(np.unique(parted[item.instances == n])) == 1 for n in (1, 5))
    whole = found_objects(labels, found, INFO, mpp=0.5, ignored=ignored, raw=True)
    assert whole.max() == 1
    ignored = np.zeros_like(ignored)
    ignored[:, :40] = True
    assert not found_objects(labels, found, INFO, mpp=0.5, ignored=ignored)[:, :40].any()


def test_small_objects_go_and_numbers_close_up() -> None:
    objects = np.array([[1, 1, 0, 2], [3, 3, 3, 0]], np.int32)
    assert without_small(objects, 2).tolist() == [[1, 1, 0, 0], [2, 2, 2, 0]]
    assert np.array_equal(without_small(objects, 0), objects)


def test_filled_takes_the_class_around() -> None:
    rows = (TissueClass("0", (0, 0, 0), background=True),)
    classes = Classes((*rows, TissueClass("1", (1, 1, 1)), TissueClass("2", (2, 2, 2))))
    labels = np.zeros((5, 9), np.uint8)
    labels[:, :4], labels[1:, 5:] = 2, 1
    labels[2, 1], labels[3, 7], labels[4, 6] = 0, 0, 0
    expected = labels.copy()
    expected[2, 1], expected[3, 7] = 2, 1  # the third is open to the edge of the image
    assert np.array_equal(filled(labels, classes), expected)


def test_evaluate_measures_objects_and_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_segmenter(
        ModelConfig(
            extractor=CNN,
            head={"name": "unet", "widths": [8, 8, 8, 8, 8]},
            classes=CLASSES.to_list(),
            mpp=0.5,
            window_px=32,
            border=True,
            objects=OBJECTS,
        )
    )

    def ideal(*_args: Any, **_named: Any) -> Prediction:
        return prediction()

    monkeypatch.setattr("wsiseg.training.evaluate.predict_image", ideal)
    result = evaluate(model, Touching(), indices=[0])
    assert result.pixel["dice"] == 1
    assert result.object is not None
    assert result.object["f1"] == 1
    assert result.object["dice"] == 1
    assert result.calibration is not None
    assert 0.05 < result.calibration["ece"] <= 0.1 + 1e-6  # sure 0.9, nearly always right
    raw = evaluate(model, Touching(), indices=[0], how=replace(Measuring(), raw=True))
    assert raw.object is not None
    assert raw.pixel["dice"] < 1
    assert raw.object["f1"] < 0.7
    none = evaluate(model, Touching(), indices=[0], how=Measuring(min_object_um2=1e308))
    assert none.object is not None
    assert none.object["tp"] == none.object["fp"] == 0


@pytest.mark.parametrize("area", [np.nan, np.inf, -1.0])
def test_objects_have_an_area(area: float) -> None:
    with pytest.raises(UsageError, match="must be a finite number from 0"):
        Measuring(min_object_um2=area)


class PartlyIgnored(Touching):
    """An object of the truth lies where nothing is labelled."""

    def __getitem__(self, index: int) -> LabelledImage:
        item = super().__getitem__(index)
        assert item.instances is not None
        mask = np.where(item.instances == 5, IGNORE, item.mask).astype(np.uint8)
        return item._replace(mask=mask)


def test_objects_of_the_truth_that_are_ignored_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_segmenter(
        ModelConfig(
            extractor=CNN,
            head={"name": "unet", "widths": [8] * 5},
            classes=CLASSES,
            window_px=32,
            mpp=0.5,
        )
    )
    truth = Touching()[0].mask == 1
    perfect = Prediction(np.stack([~truth, truth]).astype(np.float32), None, None)
    monkeypatch.setattr("wsiseg.training.evaluate.predict_item", lambda *_: perfect)
    result = evaluate(model, PartlyIgnored(), indices=[0])
    assert result.object is not None
    assert result.object["f1"] == 1
    assert result.object["hausdorff"] == 0
