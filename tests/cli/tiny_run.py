"""`wsiseg predict` in this process with a tiny model that gives many chunks, and what it left."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsiseg.classes import Classes, TissueClass
from wsiseg.cli import main
from wsiseg.geometry import Size
from wsiseg.models.base import FeatureExtractor, Features, FeatureSpec, Head, lay_out
from wsiseg.models.segmenter import ModelInfo, Segmenter

Run = Callable[..., tuple[int, str, str]]
ENDINGS = (".geojson", ".json", ".mask.ome.tif", ".overview.png")
CLASSES = Classes((TissueClass("Rest", (0, 0, 200), True), TissueClass("Gland", (200, 0, 0))))
OWN = ("--mpp", "0.5", "--overlap", "32", "--tissue", "none", "--device", "cpu")


class Pixels(FeatureExtractor):
    """The pixels themselves."""

    tile_px = 32
    specs = (FeatureSpec(3, 32),)

    def forward(self, images: Any, places: Any, seed: int) -> Features:
        return (images,)


class Bright(Head):
    """Gland where it is bright."""

    class_count = 2

    def forward(self, features: Features) -> Any:
        return lay_out(features[0])[:, :2]


def tiny_model() -> Segmenter:
    return Segmenter(Pixels(), Bright(), ModelInfo("tiny", "2" * 64, CLASSES, 0.5, 96, 32))


def use_tiny_model(patch: pytest.MonkeyPatch) -> Segmenter:
    model = tiny_model()
    patch.setattr("wsiseg.cli.predict_run.load_model", lambda *a, **k: model)
    patch.setattr("wsiseg.inference.predict.CHUNK_PX", 64)
    patch.setattr(
        "wsiseg.outputs.overview.PANEL", Size(160, 160)
    )  # half of the time would go into it
    return model


def predict(patch: pytest.MonkeyPatch, *args: object) -> int:
    """Exit code of the command."""
    patch.setattr(sys, "argv", ["wsiseg", "predict", *map(str, args), *OWN])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def slides(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for k, name in enumerate(names):
        pixels = np.random.default_rng(k).integers(0, 256, (25, 30, 3), np.uint8)
        Image.fromarray(pixels).resize((300, 250)).save(folder / f"{name}.png")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def outputs_of(*stems: str) -> list[str]:
    return sorted(["run.json", "summary.csv", *(s + e for s in stems for e in ENDINGS)])


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "summary.csv").open(newline="", encoding="utf-8") as file:
        return {row["stem"]: row for row in csv.DictReader(file)}
