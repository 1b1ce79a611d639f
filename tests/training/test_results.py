from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from wsiseg.classes import Classes, TissueClass
from wsiseg.datasets.base import LabelledDataset, LabelledImage
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.models.segmenter import Segmenter
from wsiseg.training.calibration import Reliability
from wsiseg.training.evaluate import Evaluation
from wsiseg.training.metrics import pixel_metrics
from wsiseg.training.results import write_results

CLASSES = Classes((TissueClass("rest", (0, 0, 200), True), TissueClass("nuclei", (200, 0, 0))))


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
    about = {"dataset": {"name": "folder"}, "split": "test", "fold": None}
    for calibration in (tally.summary(), None):
        result = Evaluation(pixel, {}, calibration=calibration)
        returned = write_results(
            tmp_path, result, stain_model(), dataset=NoImages(), about=about, panels=0
        )
        written = json.loads((tmp_path / "metrics.json").read_text())
        assert written["calibration"] == returned["calibration"] == calibration
        assert (tmp_path / "reliability.png").exists() == (calibration is not None)
        report = (tmp_path / "report.html").read_text()
        assert ("Expected calibration error" in report) == (calibration is not None)
        assert ("Reliability diagram" in report) == (calibration is not None)
