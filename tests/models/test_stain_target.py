"""The stains a model was trained on: in its configuration, its file and its identity."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CLASSES, EXTRACTORS, HEADS

from wsiseg.config import from_mapping, to_mapping
from wsiseg.errors import CheckpointError, ConfigError
from wsiseg.models.checkpoint import load_model, read_card, save_checkpoint
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.stain import StainBasis

TARGET = StainBasis(((0.6, 0.64, 0.48), (0.0, 0.96, 0.28)), (1.8, 0.9))


def config(**more: Any) -> ModelConfig:
    return ModelConfig(
        extractor=EXTRACTORS["stain"],
        head=HEADS["fcn"],
        classes=CLASSES,
        window_px=96,
        **more,
    )


@pytest.mark.parametrize("target", [TARGET, to_mapping(TARGET)])
def test_it_goes_through_configuration_and_file(tmp_path: Path, target: Any) -> None:
    model = config(stain_target=target)
    assert from_mapping(ModelConfig, to_mapping(model)) == model
    segmenter = build_segmenter(model)
    assert segmenter.info.stain_target == TARGET
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, segmenter, card={}, licence="none")
    assert load_model(path, device="cpu").info.stain_target == TARGET


def test_without_one_nothing_changes(tmp_path: Path) -> None:
    plain, normalised = build_segmenter(config()), build_segmenter(config(stain_target=TARGET))
    assert plain.info.stain_target is None
    assert plain.info.sha256 != normalised.info.sha256
    path = tmp_path / "old.safetensors"
    later = ("border", "temperature", "objects")
    old = {k: v for k, v in plain.info.config.items() if v is not None and k not in later}
    object.__setattr__(plain.info, "config", old)
    save_checkpoint(path, plain, card={}, licence="none")
    assert "stain_target" not in read_card(path)["config"]
    assert load_model(path, device="cpu").info.stain_target is None
    digest = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    assert plain.info.sha256 == digest, "models without weights keep their name"


def test_a_target_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stain_target: must be a mapping"):
        config(stain_target=3)
    with pytest.raises(ConfigError, match="unit vectors"):
        config(stain_target={"vectors": [[1, 1, 1], [0, 1, 0]], "maxima": [1, 1]})
    segmenter = build_segmenter(config(stain_target=TARGET))
    broken = {**segmenter.info.config, "stain_target": {"vectors": [[0, 1, 0]], "maxima": [1, 1]}}
    object.__setattr__(segmenter.info, "config", broken)
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, segmenter, card={}, licence="none")
    with pytest.raises(CheckpointError, match=r"stain_target\.vectors"):
        load_model(path, device="cpu")
