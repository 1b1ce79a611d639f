"""Every shipped configuration: it loads, is explained, and trains a step of its own network."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wsiseg.classes import Classes, TissueClass
from wsiseg.config import find_config, from_mapping, load_yaml, to_mapping
from wsiseg.datasets.base import LabelledDataset, LabelledImage
from wsiseg.datasets.table import DATASETS, dataset_mapping, open_dataset
from wsiseg.errors import ConfigError
from wsiseg.geometry import Point
from wsiseg.models.base import FeatureExtractor
from wsiseg.models.checkpoint import load_model, save_extractor
from wsiseg.models.extractors.hipt import from_pathsegdiff
from wsiseg.models.registry import (
    EXTRACTORS,
    HEADS,
    ModelConfig,
    build_extractor,
    build_segmenter,
    extractor_mapping,
    with_options,
)
from wsiseg.models.zoo import MODELS
from wsiseg.training.losses import segmentation_loss
from wsiseg.training.pretrain_config import pretrain_config
from wsiseg.training.start import starting_point
from wsiseg.training.train import TrainConfig, train

ROOT = Path(__file__).resolve().parents[1] / "configs"
REFERENCE = ROOT / "train" / "reference.yaml"
TRAIN = [p for p in sorted((ROOT / "train").rglob("*.yaml")) if p != REFERENCE]
SMALL = sorted((ROOT / "train" / "small").glob("*.yaml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def test_there_are_configs() -> None:
    known = {"pretrain", "train", "cards", "datasets"}
    found = list(ROOT.rglob("*.yaml"))
    assert {p.relative_to(ROOT).parts[0] for p in found} == known
    methods = {"pathsegdiff", "pathsegdiff-null", "hipt-fcn", "res-unet", "vgg16-fcn8"}
    assert methods <= {p.stem for p in (ROOT / "train" / "bcss").iterdir()}
    assert methods | {"genselfdiff"} <= {p.stem for p in (ROOT / "train" / "glas").iterdir()}
    assert {p.stem for p in SMALL} == methods | {"genselfdiff", "ddpm-mlp"}
    for path in (ROOT / "cards").rglob("*.yaml"):
        assert {"use", "data", "terms", "limits", "commands"} <= set(load_yaml(path))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.yaml")), ids=name_of)
def test_it_begins_with_what_it_is(path: Path) -> None:
    assert path.read_text().startswith("# ")


def test_the_reference_has_every_key_with_its_default() -> None:
    data = load_yaml(REFERENCE)
    assert data == to_mapping(TrainConfig())


@pytest.mark.parametrize("path", sorted((ROOT / "datasets").glob("*.yaml")), ids=name_of)
def test_data_sets_load(path: Path) -> None:
    assert dataset_mapping(path)["name"] in DATASETS
    assert dataset_mapping(path.stem) == dataset_mapping(path)


def test_the_example_in_the_documentation_loads(tmp_path: Path) -> None:
    text = (ROOT.parent / "docs" / "training.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    mapping = dataset_mapping(tmp_path / "mine.yaml")
    assert [p["name"] for p in mapping["parts"]] == ["train", "test"]
    assert mapping["classes"][1]["values"] == [1, 4]
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for stem in ("train_patient1_a", "train_patient1_b", "train_patient2_a", "test_patient3_a"):
            (tmp_path / kind / f"{stem}.png").touch()
    groups = [open_dataset(mapping, tmp_path, part).groups for part in ("train", "test")]
    assert groups == [("patient1", "patient1", "patient2"), ("patient3",)]


@pytest.mark.parametrize("path", sorted((ROOT / "pretrain").rglob("*.yaml")), ids=name_of)
def test_pretraining_loads(path: Path) -> None:
    assert pretrain_config(load_yaml(path)).sources


@pytest.mark.parametrize("name", ["glas-small", "few-labels"])
def test_training_starts_from_its_pretraining(name: str, tmp_path: Path) -> None:
    """With the scale of latents, which pretraining measures and no configuration states."""
    mapping = {"name": "pathsegdiff", **_pretrained(name)}
    if "first_stage" in mapping:
        mapping["first_stage"] = {**mapping["first_stage"], "scale": 0.37}
    path = tmp_path / "extractor.safetensors"
    save_extractor(path, build_extractor(mapping), card={}, licence="CC0-1.0")
    run = from_mapping(TrainConfig, load_yaml(ROOT / "train" / f"{name}.yaml"))
    start = starting_point(run, str(path), device="cpu").model
    assert isinstance(start, FeatureExtractor)
    found = extractor_mapping(start)
    assert "first_stage" not in found or found["first_stage"]["scale"] == 0.37


def test_defaults_of_the_data_sets_are_shipped() -> None:
    for entry in DATASETS.values():
        assert find_config(entry.training, "train").is_file()
    with pytest.raises(ConfigError, match="nor one of the shipped ones: annotations, bcss"):
        find_config("bcss/none", "train")


def extractor_of(config: TrainConfig, path: Path) -> dict[str, Any]:
    """The full extractor's mapping: the configuration's, or the one it is made to change."""
    own = dict(config.extractor)
    if own.get("name") == "hipt" and len(own) == 1 and path.parent.name == "small":
        return {"name": "hipt", **_pretrained("small/pathsegdiff", "encoder")}
    if "name" not in own:
        base = MODELS["pathsegdiff-brca"].extractor
        if path.parent.name == "small":
            base = _pretrained("small/pathsegdiff")
        elif path.stem.startswith(("glas-small-", "luad-small", "annotations")):
            base = _pretrained("glas-small")
        assert base is not None
        return with_options({"name": "pathsegdiff", **base}, own)
    if path.parent.name == "small" and own["name"] in ("genselfdiff", "ddpm"):
        return {
            **load_yaml(ROOT / "pretrain" / "small" / f"{own['name']}.yaml")["extractor"],
            **own,
        }
    return own


def _pretrained(name: str, part: str = "") -> dict[str, Any]:
    whole = load_yaml(ROOT / "pretrain" / f"{name}.yaml")["extractor"]
    return {part: whole[part]} if part else whole


@pytest.mark.parametrize("path", TRAIN, ids=name_of)
def test_a_step_at_full_size_fits(path: Path) -> None:
    """Forward and backward of a whole batch on the meta device: all shapes, no memory."""
    config = from_mapping(TrainConfig, load_yaml(path))
    mapping = extractor_of(config, path)
    with torch.device("meta"):
        extractor = build_extractor(mapping)
        trained = extractor.trainable(config.trainable)
        model = ModelConfig(
            extractor=extractor_mapping(extractor),
            head=config.head,
            classes=Squares.classes,
            mpp=config.mpp or 0.5,
            window_px=config.window_px,
        )
        segmenter = build_segmenter(model, extractor=extractor)
    sides = [n * extractor.tile_px for n in config.patch_tiles]
    images = torch.zeros(2, 3, *sides, device="meta")
    logits = segmenter.window_logits(segmenter.features(images, [Point(0, 0)] * 2, 0))
    assert logits.shape == (2, 2, *sides)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in segmenter.head.parameters())
    reached = sum(p.grad is not None for p in trained)  # not the layers after the last tap
    assert reached >= 0.95 * len(trained)
    assert mapping["name"] in EXTRACTORS
    assert config.head["name"] in HEADS


@pytest.mark.parametrize("path", TRAIN, ids=name_of)
def test_the_loss_of_a_step_is_a_number(path: Path) -> None:
    config = from_mapping(TrainConfig, load_yaml(path))
    logits = torch.randn(2, 3, 16, 16, requires_grad=True)
    target = torch.randint(0, 3, (2, 16, 16))
    weights = torch.tensor([0.5, 0.7, 0.8]) if config.loss.class_weights != "none" else None
    loss = segmentation_loss(logits, target, config.loss, weights=weights)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert float(logits.grad.abs().sum()) > 0  # type: ignore[union-attr]


class Squares(LabelledDataset):
    """Two images with a dark square."""

    classes = Classes((TissueClass("a", (0, 0, 0), background=True), TissueClass("b", (1, 1, 1))))
    mpp = 1.0
    names = groups = ("0", "1")

    def __getitem__(self, index: int) -> LabelledImage:
        mask = np.zeros((64, 64), np.uint8)
        mask[8:40, 16:48] = 1
        image = np.where(mask[..., None] > 0, 60, 220).repeat(3, axis=2).astype(np.uint8)
        return LabelledImage(str(index), image, mask, str(index))


@pytest.mark.parametrize("path", SMALL, ids=name_of)
def test_small_ones_train_a_step(path: Path, tmp_path: Path) -> None:
    config = from_mapping(TrainConfig, load_yaml(path))
    loop = replace(config.loop, steps=1, batch_size=2)
    cache = replace(config.feature_cache, patches=min(2, config.feature_cache.patches))
    config = replace(config, loop=loop, feature_cache=cache, validation_share=0.0)
    torch.manual_seed(0)
    if path.stem == "hipt-fcn":  # as the command does: out of a PathSegDiff file
        whole = build_extractor({"name": "pathsegdiff", **_pretrained("small/pathsegdiff")})
        extractor = from_pathsegdiff(whole)
    else:
        extractor = build_extractor(extractor_of(config, path))
    written = train(config, Squares(), extractor.eval(), out=tmp_path)
    assert load_model(written, device="cpu").info.classes.names == ("a", "b")
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert rows[1].startswith("1,")
