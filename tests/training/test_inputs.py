"""What a run trains with: limits, classes, validation, what is read before it begins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from discs import CNN, Discs, config, fit, interrupt, network

from wsiseg.classes import Classes, TissueClass
from wsiseg.datasets.base import LabelledImage, UInt8
from wsiseg.errors import (
    DatasetError,
    UsageError,
)
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.training import contents, head_task
from wsiseg.training.evaluate import Evaluation
from wsiseg.training.head_task import HeadTask
from wsiseg.training.inputs import Inputs, choose_inputs
from wsiseg.training.metrics import pixel_metrics


def test_limit_draws_training_images_only() -> None:
    data = Discs(20)
    whole, few = choose_inputs(config(), data), choose_inputs(config(limit=3), data)
    assert whole.validation == few.validation
    assert len(few.training) == 3
    assert set(few.training) < set(whole.training)
    assert choose_inputs(config(limit=3, seed=1), data).training != few.training
    with pytest.raises(UsageError, match=r"limit 30: only 1[0-9] images"):
        choose_inputs(config(limit=30), data)


def test_a_class_without_pixels_is_an_error() -> None:
    data = Discs()
    data.classes = Classes((*Discs.classes, TissueClass("necrosis", (1, 1, 1))))
    with pytest.raises(DatasetError, match="no pixel of class 'necrosis' in the 6 training"):
        choose_inputs(config(), data)
    weights = choose_inputs(
        config(allow_empty_classes=True, loss={"class_weights": "frequency"}), data
    ).weights
    assert weights is not None
    assert weights[2] == 1
    assert weights[0] + weights[1] == pytest.approx(1)


class Marked(Discs):
    """The same with labels of some patients left out: all, or those of a class."""

    def __init__(self, patients: set[str], *values: int) -> None:
        super().__init__()
        self.patients, self.values = patients, values

    def __getitem__(self, index: int) -> LabelledImage:
        item = super().__getitem__(index)
        gone = np.isin(item.mask, self.values) & (item.group in self.patients)
        return item._replace(mask=np.where(gone, 255, item.mask).astype(np.uint8))


def validated() -> set[str]:
    data = Discs()
    return {data.groups[i] for i in choose_inputs(config(), data).validation}


def test_validation_without_a_labelled_pixel_is_refused(tmp_path: Path) -> None:
    message = "none of the 2 validation images has a labelled pixel.* seed or validation_share"
    with pytest.raises(DatasetError, match=message):
        fit(config(), tmp_path, data=Marked(validated(), 0, 1))
    assert not list(tmp_path.iterdir())
    choose_inputs(config(validation_share=0.0), Discs())


def test_classes_that_no_validation_image_has_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no validation image has a pixel of disc: the Dice"):
        fit(config(loop={"steps": 1}), tmp_path, data=Marked(validated(), 1))


def test_a_stray_pixel_of_such_a_class_does_not_choose_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Discs()
    data.classes = Classes((*Discs.classes, TissueClass("necrosis", (1, 1, 1))))
    of = ModelConfig(
        extractor=CNN, head=config().head, classes=data.classes.to_list(), mpp=1.0, window_px=32
    )
    model = build_segmenter(of, extractor=network(config()))
    inputs = Inputs(data, range(4), range(4, 8), np.ones((4, 3), np.int64))
    task = HeadTask(model, config(), inputs, run=tmp_path)
    # Worse, and then better but for one pixel of a class that no validation image has.
    matrices = [[[50, 10, 0], [10, 30, 0], [0, 0, 0]], [[59, 0, 1], [0, 40, 0], [0, 0, 0]]]
    measured = [Evaluation(pixel_metrics(np.array(m), data.classes), {}) for m in matrices]
    monkeypatch.setattr(head_task, "evaluate", lambda *_, **__: measured.pop(0))
    chosen = []
    for step in (1, 3):
        outcome = task.after_step(step, 0.0)
        assert outcome is not None
        chosen.append(outcome.measured["dice"])
    assert chosen == pytest.approx([(100 / 120 + 60 / 80) / 2, (118 / 119 + 1) / 2])
    assert float(torch.load(tmp_path / "best.pt")["best"]) == pytest.approx(chosen[1])


class Changed(Discs):
    """The same but for two pixels of one image, or of its labels."""

    def __init__(self, of: int, what: str) -> None:
        super().__init__()
        self.of, self.what = of, what

    def __getitem__(self, index: int) -> LabelledImage:
        item = super().__getitem__(index)
        if index == self.of:
            array = getattr(item, self.what)
            array[0, 0], array[1, 0] = 1, 0
        return item


class Damaged(Discs):
    """The same, but images cannot be read, though their masks can."""

    def __getitem__(self, index: int) -> LabelledImage:
        if index in self.lost:
            raise DatasetError(f"image {index}: not a readable image")
        return super().__getitem__(index)

    def mask(self, index: int) -> UInt8:
        return Discs()[index].mask

    lost: frozenset[int] = frozenset()


def test_what_cannot_be_read_ends_a_run_before_it_begins(tmp_path: Path) -> None:
    data = Damaged()
    for index in choose_inputs(config(), data).validation:
        data.lost = frozenset({index})
        with pytest.raises(DatasetError, match=f"image {index}: not a readable"):
            fit(config(loop={"log_every": 1}), tmp_path, data=data)
    data.lost = frozenset()
    fit(config(loop={"steps": 1}), tmp_path, data=data)  # nothing says that it holds a run


def test_values_of_validation_masks_are_looked_at_first(tmp_path: Path) -> None:
    class Odd(Discs):
        def __getitem__(self, index: int) -> LabelledImage:
            item = super().__getitem__(index)
            return item._replace(mask=item.mask * (7 if item.group in validated() else 1))

    with pytest.raises(DatasetError, match="masks hold the value 7"):
        fit(config(), tmp_path, data=Odd())
    assert not list(tmp_path.iterdir())


def test_other_labels_are_another_run(tmp_path: Path) -> None:
    class Inverted(Discs):
        def __getitem__(self, index: int) -> LabelledImage:
            item = super().__getitem__(index)
            return item._replace(mask=(1 - item.mask).astype(np.uint8))

    class Restained(Discs):
        def __getitem__(self, index: int) -> LabelledImage:
            item = super().__getitem__(index)
            return item._replace(image=item.image // 2)

    class Renamed(Discs):
        classes = Classes((TissueClass("ground", (0, 0, 0)), TissueClass("spot", (90, 0, 90))))

    interrupt(config(), tmp_path, after=2)
    changed = [Changed(of, what) for of in range(8) for what in ("image", "mask", "instances")]
    for other in (Inverted(), Restained(), Renamed(), Discs(10), *changed):
        with pytest.raises(UsageError, match="another extractor, other images or labels"):
            fit(config(), tmp_path, resume=True, data=other)


def test_long_reading_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contents, "SAID_EVERY_S", -1.0)
    found = contents.contents_of(Discs(3), [2, 0])
    assert capsys.readouterr().out.splitlines() == [
        "reading images: 0 of 2",
        "reading images: 1 of 2",
    ]
    assert found.images[0] != found.images[1]
