from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsiseg.classes import Classes, TissueClass
from wsiseg.datasets.base import LabelledDataset, LabelledImage
from wsiseg.errors import DatasetError, OutputError
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.models.segmenter import Segmenter
from wsiseg.training.calibration import Reliability
from wsiseg.training.contents import contents_of
from wsiseg.training.evaluate import Evaluation
from wsiseg.training.learnt import warn_of_training_images
from wsiseg.training.metrics import pixel_metrics
from wsiseg.training.results import check_labelled, claim_results, write_results

CLASSES = Classes((TissueClass("rest", (0, 0, 200), True), TissueClass("nuclei", (200, 0, 0))))

ABOUT = {"dataset": {"name": "folder"}, "split": "test", "fold": None}


class NoImages(LabelledDataset):
    """A data set that is not asked for an image."""

    classes, mpp, names, groups = CLASSES, 0.5, (), ()

    def __getitem__(self, index: int) -> LabelledImage:
        raise IndexError(index)


def stain_model() -> Segmenter:
    config = ModelConfig(
        extractor={"name": "stain", "tile_px": 32},
        head={"name": "threshold"},
        classes=CLASSES,
        window_px=96,
    )
    return build_segmenter(config)


def test_calibration_stands_in_the_files_where_it_was_measured(tmp_path: Path) -> None:
    tally = Reliability()
    tally.add(np.float32([[[0.9, 0.7]], [[0.1, 0.3]]]), np.uint8([[0, 1]]))
    pixel = pixel_metrics(np.array([[1, 0], [1, 0]]), CLASSES)
    for calibration in (tally.summary(), None):
        result = Evaluation(pixel, {}, calibration=calibration)
        returned = write_results(
            tmp_path, result, stain_model(), dataset=NoImages(), about=ABOUT, panels=0
        )
        written = json.loads((tmp_path / "metrics.json").read_text())
        assert written["calibration"] == returned["calibration"] == calibration
        assert (tmp_path / "reliability.png").exists() == (calibration is not None)
        report = (tmp_path / "report.html").read_text()
        assert ("Expected calibration error" in report) == (calibration is not None)
        assert ("Reliability diagram" in report) == (calibration is not None)


def test_images_of_any_name_stand_in_the_tables(tmp_path: Path) -> None:
    pixel = pixel_metrics(np.array([[1, 0], [1, 0]]), CLASSES)
    row = {"accuracy": 1.0, "dice": 1.0, "miou": 1.0, "f1": 1.0}
    result = Evaluation(pixel, {"日本": row, "bad\udcff": row})
    write_results(tmp_path, result, stain_model(), dataset=NoImages(), about=ABOUT, panels=0)
    assert (tmp_path / "metrics.json").is_file()
    for name in ("report.html", "per_image.csv"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "日本" in text
        assert "bad\\udcff" in text


def test_a_folder_that_cannot_be_written_is_said_before_and_after(tmp_path: Path) -> None:
    claim_results(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "panels").mkdir()
    claim_results(tmp_path)
    (tmp_path / "panels").rmdir()
    (tmp_path / "panels").touch()
    with pytest.raises(OutputError, match=r"panels: cannot be written \(Not a directory\)"):
        claim_results(tmp_path)
    result = Evaluation(pixel_metrics(np.array([[1, 0], [1, 0]]), CLASSES), {})
    words: dict[str, Any] = {"dataset": named("a"), "about": ABOUT, "panels": 0}
    with pytest.raises(OutputError, match=r"panels/a\.png: cannot be removed"):
        write_results(tmp_path, result, stain_model(), **words)
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(OutputError, match=r"metrics\.json: cannot be removed"):
        write_results(tmp_path, result, stain_model(), **words)


def test_panels_of_an_earlier_evaluation_are_removed(tmp_path: Path) -> None:
    pixel = pixel_metrics(np.array([[1, 0], [1, 0]]), CLASSES)
    row = {"accuracy": 1.0, "dice": 1.0, "miou": 1.0, "f1": 1.0}
    panels = tmp_path / "panels"
    panels.mkdir()
    words: dict[str, Any] = {"dataset": NoImages(), "about": ABOUT, "panels": 0}
    write_results(tmp_path, Evaluation(pixel, {"a/b": row}), stain_model(), **words)
    for name in ("a%2Fb.png", "name.png", "mine.png"):
        (panels / name).touch()
    write_results(tmp_path, Evaluation(pixel, {"c": row}), stain_model(), **words)
    assert {p.name for p in panels.iterdir()} == {"name.png", "mine.png"}
    (tmp_path / "per_image.csv").write_bytes(b"\xff\n\n")  # of somebody else
    write_results(tmp_path, Evaluation(pixel, {"c": row}), stain_model(), **words)


class Named(NoImages):
    """Images that have names and groups only."""

    def __init__(self, names: tuple[str, ...], groups: tuple[str, ...]) -> None:
        self.names, self.groups = names, groups


def named(*names: str, groups: tuple[str, ...] = ()) -> Named:
    return Named(names, groups or names)


def test_patients_that_a_model_learnt_are_told_where_images_are_cut_otherwise() -> None:
    card = {
        "dataset": {"name": "bcss", "part": "train", "patch_px": 800},
        "training_images": ["a_0_0", "b_0_0"],
        "training_groups": ["a", "b"],
    }
    regions = named("a", "c", groups=("a", "c"))
    described = {"name": "bcss", "cut": "rois"}
    with pytest.warns(UserWarning, match="1 of the 2 images are of patients or slides of the mod"):
        warn_of_training_images(card, described, regions, part="train")
    start = {**card, "training_groups": ["c"]}  # what it was trained from knew the other one
    with pytest.warns(UserWarning, match="2 of the 2 images are of patients"):
        warn_of_training_images({**card, "extractor": start}, described, regions, part="train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_training_images(card, described, regions, part="test")
        warn_of_training_images(card, {**described, "url": "x"}, regions, part="train")
        warn_of_training_images(card, described, named("c"), part="train")


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_images_that_a_model_or_what_it_came_from_learnt_are_told(depth: int) -> None:
    data = {"name": "glas"}
    card: dict[str, Any] = {"dataset": {"name": "glas"}, "training_images": ["a", "b"]}
    for _ in range(depth):
        card = {"dataset": {"name": "glas"}, "training_images": ["c"], "extractor": card}
    with pytest.warns(UserWarning, match="1 of the 2 images were in the model's training"):
        warn_of_training_images(card, data, named("b", "d"), part="x")
    with pytest.warns(UserWarning, match=f"{1 + bool(depth)} of the 2 images"):
        warn_of_training_images(card, data, named("b", "c"), part="x")
    with pytest.warns(UserWarning, match="1 of the 2 images"):  # the same images, other labels
        warn_of_training_images(card, {**data, "classes": "grades"}, named("b", "d"), part="x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_training_images(card, {"name": "bcss"}, named("b", "d"), part="x")
        warn_of_training_images(card, {**data, "images": "o/*.png"}, named("b", "d"), part="x")
        warn_of_training_images(card, data, named("d"), part="x")


class Painted(Named):
    """Images of one colour each, none of it labelled."""

    def __init__(self, colours: dict[str, int], groups: tuple[str, ...] = ()) -> None:
        super().__init__(tuple(colours), groups or tuple(colours))
        self.colours = colours

    def __getitem__(self, index: int) -> LabelledImage:
        name = self.names[index]
        image = np.full((4, 6, 3), self.colours[name], np.uint8)
        return LabelledImage(name, image, np.full((4, 6), 255, np.uint8), self.groups[index])


OPTIONS = {"name": "folder", "images": "train/*.png", "mpp": 1.0}


def card_of(data: LabelledDataset) -> dict[str, Any]:
    """A card of a model that was trained on all of a data set."""
    return {
        "dataset": {**OPTIONS, "part": "train"},
        "training_images": list(data.names),
        "training_groups": sorted(set(data.groups)),
        "training_contents": list(contents_of(data, range(len(data))).images),
    }


@pytest.mark.parametrize("depth", [0, 1])
def test_images_that_a_model_learnt_are_known_by_what_they_show(depth: int) -> None:
    card = card_of(Painted({"a": 1, "b": 2}))
    for _ in range(depth):
        card = {"dataset": {"name": "glas"}, "training_images": ["c"], "extractor": card}
    same = Painted({"x": 2, "b": 3, "y": 1})
    other = {"name": "folder", "images": "*.png", "mpp": 2.0}
    with pytest.warns(UserWarning, match="2 of the 3 images were in the model's training"):
        warn_of_training_images(card, other, same, part="all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of another part or folder, under the same names
        warn_of_training_images(card, OPTIONS, Painted({"a": 4, "b": 5}), part="test")
        warn_of_training_images(card, OPTIONS, Painted({"a": 4, "b": 5}), part="train")


def test_other_images_of_patients_that_a_model_learnt_are_told() -> None:
    card = card_of(Painted({"a1": 1, "b1": 2}, ("a", "b")))
    rest = Painted({"a1": 1, "a2": 3, "c1": 4}, ("a", "a", "c"))
    with pytest.warns(UserWarning, match="2 of the 3 images are of patients or slides"):
        warn_of_training_images(card, OPTIONS, rest, part="train")
    slides = {"name": "qupath", "patch_px": 512}
    card["dataset"] = {"name": "qupath", "patch_px": 1024, "part": "train"}
    with pytest.warns(UserWarning, match="2 of the 3 images are of patients or slides"):
        warn_of_training_images(
            card, slides, Painted({"a1": 7, "a2": 8, "c1": 9}, ("a", "a", "c")), part="train"
        )


def test_nothing_labelled_is_nothing_to_measure() -> None:
    with (
        pytest.warns(UserWarning, match=r"6 x 4 px\) and 1 more of 2 images: under 8 px"),
        pytest.raises(DatasetError, match="none of the 2 images has a labelled pixel"),
    ):
        check_labelled(Painted({"a": 1, "b": 2}))
