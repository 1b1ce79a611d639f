"""`wsiseg predict` with a model that was trained on normalised stains."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner, Result
from PIL import Image

from wsiseg.cli import cli
from wsiseg.geometry import Size
from wsiseg.models.checkpoint import save_checkpoint
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.slides.phantom import write_phantom
from wsiseg.stain import StainBasis

TARGET = StainBasis(((0.6, 0.64, 0.48), (0.0, 0.96, 0.28)), (1.8, 0.9))
CLASSES = [
    {"name": "Other", "color": [0, 0, 200], "background": True},
    {"name": "Nuclei", "color": [200, 0, 0]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    config = ModelConfig(
        extractor={"name": "stain", "tile_px": 64},
        head={"name": "threshold"},
        classes=CLASSES,
        window_px=192,
        stain_target=TARGET,
    )
    path = tmp_path_factory.mktemp("model") / "normalised.safetensors"
    save_checkpoint(path, build_segmenter(config), card={}, licence="none")
    return path


def predict(slide: Path, out: Path, model: Path, *options: str) -> Result:
    args = ["predict", str(slide), "--out", str(out), "--model", str(model), "--device", "cpu"]
    return CliRunner().invoke(
        cli, [*args, "--mpp", "0.5", "--overlap", "64", *options], catch_exceptions=False
    )


def test_the_sidecar_says_how_and_workers_do_not_matter(tmp_path: Path, model: Path) -> None:
    slide = tmp_path / "colon.tif"
    write_phantom(slide, Size(500, 400), mpp=0.5, seed=1)
    masks, matrices = [], []
    for name, options in (
        ("a", ("--batch-size", "1", "--workers", "1")),
        ("b", ("--batch-size", "9", "--workers", "3")),
    ):
        result = predict(slide, tmp_path / name, model, *options)
        assert result.exit_code == 0, result.output
        assert "warning" not in result.output
        record = json.loads((tmp_path / name / "colon.json").read_text())
        matrices.append(record["parameters"]["stain_matrix"])
        masks.append(tifffile.imread(tmp_path / name / "colon.mask.ome.tif"))
    assert np.array(matrices[0]).shape == (3, 3)
    assert matrices[0] == matrices[1]
    assert masks[0].tobytes() == masks[1].tobytes()
    assert len(np.unique(masks[0])) > 1


def test_too_little_tissue_is_a_warning(tmp_path: Path, model: Path) -> None:
    slide = tmp_path / "glass.png"
    Image.fromarray(np.full((300, 300, 3), 246, np.uint8)).save(slide)
    result = predict(slide, tmp_path / "out", model, "--tissue", "none")
    assert result.exit_code == 0, result.output
    assert f"wsiseg: warning: {slide}: too little tissue" in result.output
    record = json.loads((tmp_path / "out" / "glass.json").read_text())
    assert record["parameters"]["stain_matrix"] is None
