"""What of an extractor training changes, and going on with a trained head."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wsiseg.classes import Classes, TissueClass
from wsiseg.config import from_mapping
from wsiseg.datasets.base import LabelledDataset, LabelledImage
from wsiseg.errors import ConfigError, UsageError
from wsiseg.models.checkpoint import load_model, save_extractor
from wsiseg.models.extractors.pathsegdiff import PathSegDiffExtractor
from wsiseg.models.registry import build_extractor
from wsiseg.models.segmenter import Segmenter
from wsiseg.training.start import starting_point
from wsiseg.training.train import TrainConfig, train

EXTRACTOR: dict[str, Any] = {
    "name": "pathsegdiff",
    "encoder": {"dim": 16, "depth": 1, "heads": 2, "patch_px": 16, "position_px": 64},
    "first_stage": {"kind": "kl", "channels": [8, 8, 8], "layers": 1, "groups": 4},
    "unet": {"channels": [8, 8, 16, 16], "layers": 2, "context_dim": 16, "groups": 4},
    "region_dim": 0,
    "tile_px": 64,
}


class Squares(LabelledDataset):
    """Four images with a dark square."""

    classes = Classes((TissueClass("a", (0, 0, 0)), TissueClass("b", (1, 1, 1))))
    mpp = 1.0
    names = groups = ("0", "1", "2", "3")

    def __getitem__(self, index: int) -> LabelledImage:
        mask = np.zeros((64, 64), np.uint8)
        mask[8 * index : 8 * index + 32, 16:48] = 1
        image = np.where(mask[..., None] > 0, 60, 220).repeat(3, axis=2).astype(np.uint8)
        return LabelledImage(str(index), image, mask, str(index))


def config(trainable: str, **changes: Any) -> TrainConfig:
    loop = {"steps": 2, "batch_size": 2, "learning_rate": 0.01, "warmup_steps": 1}
    data = {"head": {"name": "fcn", "widths": [8, 8, 8]}, "mpp": 1.0, "window_px": 64}
    data |= {"patch_tiles": [1, 1], "validation_share": 0.0, "trainable": trainable}
    return from_mapping(TrainConfig, {**data, "loop": loop, **changes})


@pytest.mark.parametrize(
    ("trainable", "parts"),
    [
        ("none", set()),
        ("decoder", {"unet.mid_block", "unet.up_blocks"}),
        ("all", {"unet.mid_block", "unet.up_blocks", "unet.down_blocks", "unet.conv_in"}),
        (
            "network",
            {
                *("unet.mid_block", "unet.up_blocks", "unet.down_blocks", "unet.conv_in"),
                *("first_stage.encoder", "first_stage.quant_conv", "conditioner.patch_fc"),
                "encoder.net",
            },
        ),
    ],
)
def test_only_what_is_trainable_changes(trainable: str, parts: set[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    extractor = build_extractor(EXTRACTOR)
    before = {k: v.clone() for k, v in extractor.state_dict().items()}
    path = train(config(trainable), Squares(), extractor, out=tmp_path)
    after: dict[str, Tensor] = extractor.state_dict()
    changed = {".".join(k.split(".")[:2]) for k in after if not torch.equal(before[k], after[k])}
    assert changed - {"unet.time_embedding"} == parts
    stored = load_model(path, device="cpu").extractor.state_dict()
    name = "unet.up_blocks.3.resnets.2.conv1.weight"
    assert torch.allclose(stored[name], after[name], atol=1e-3)


def test_a_trained_head_is_gone_on_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = train(config("none"), Squares(), build_extractor(EXTRACTOR), out=tmp_path / "a")
    model = load_model(first, device="cpu")
    still = {"steps": 1, "batch_size": 2, "learning_rate": 1e-12, "warmup_steps": 1}
    second = train(config("all", loop=still), Squares(), model, out=tmp_path / "b")
    start, end = (load_model(p, device="cpu").head.state_dict() for p in (first, second))
    assert torch.allclose(start["conv.weight"], end["conv.weight"], atol=1e-6)


class Renamed(Squares):
    """The same with classes of other names."""

    def __init__(self, *names: str) -> None:
        self.classes = Classes(tuple(TissueClass(name, (0, 0, 0)) for name in names))


class WithObjects(Squares):
    """The same with object numbers."""

    def __getitem__(self, index: int) -> LabelledImage:
        item = super().__getitem__(index)
        return item._replace(instances=item.mask.astype(np.int32))


def test_a_head_that_does_not_fit_says_why(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, bordered = (
        load_model(
            train(config("none", **more), WithObjects(), build_extractor(EXTRACTOR), out=out),
            device="cpu",
        )
        for more, out in (({}, tmp_path / "a"), ({"border_um": 2.0}, tmp_path / "b"))
    )
    wide = config("none", head={"name": "fcn", "widths": [16, 8, 8]})
    plain, borders = config("none"), config("none", border_um=2.0)
    for run, data, start, messages in (
        (wide, Squares(), first, [r"head.widths was .* and is .* \(set head to {.*\[8, 8, 8\]"]),
        (plain, Squares(), bordered, [r"of b does not fit: it has an output .* border_um to 2\.0"]),
        (borders, WithObjects(), first, [r"it has no output for borders \(set border_um to 0\)"]),
        (
            plain,
            Renamed("b", "a"),
            first,
            [r"another order or spelling: a, b \(.* has b, a"],
        ),
        (
            plain,
            Renamed("A", " b"),
            first,
            [r"another order or spelling: a, b \(.* has A"],
        ),
        (plain, Renamed("a", "c"), first, [r"its classes are a, b, those of the data a, c; or le"]),
        (wide, Renamed("a", "c"), bordered, ["its classes are", "border_um to", "head.widths"]),
    ):
        for message in messages:
            with pytest.raises(UsageError, match=message):
                train(run, data, start, out=tmp_path / "c")


def test_post_processing_that_is_left_behind_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = config("none", objects={"min_area_um2": 50.0})
    first = train(own, Squares(), build_extractor(EXTRACTOR), out=tmp_path / "a")
    with pytest.warns(UserWarning, match="the post-processing of a is not taken over"):
        train(config("none"), Squares(), load_model(first, device="cpu"), out=tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(own, Squares(), load_model(first, device="cpu"), out=tmp_path / "c")


@pytest.mark.parametrize(
    "asked", [{"timesteps": [200]}, {"name": "cnn"}, {"name": "pathsegdiff", "taps": [0]}]
)
def test_with_its_head_a_model_keeps_its_extractor(asked: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = train(config("none"), Squares(), build_extractor(EXTRACTOR), out=tmp_path)
    same = {"name": "pathsegdiff", "timesteps": [50]}
    start = starting_point(config("none", extractor=same), str(first), with_head=True, device="cpu")
    assert isinstance(start.model, Segmenter)
    with pytest.raises(ConfigError, match="extractor"):
        starting_point(config("none", extractor=asked), str(first), with_head=True, device="cpu")


def test_what_a_part_leaves_out_stays_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    measured = {**EXTRACTOR["first_stage"], "scale": 0.37, "shift": 0.1}
    save_extractor(
        path, build_extractor({**EXTRACTOR, "first_stage": measured}), card={}, licence="CC0-1.0"
    )
    asked = {**EXTRACTOR, "timesteps": [200]}
    model = starting_point(config("none", extractor=asked), str(path), device="cpu").model
    assert isinstance(model, PathSegDiffExtractor)
    assert (model.config.first_stage.scale, model.config.first_stage.shift) == (0.37, 0.1)
    assert model.config.timesteps == (200,)
    for part in ({"channels": [8, 8, 16]}, {"scale": 1.0}):
        other = {**EXTRACTOR, "first_stage": {**EXTRACTOR["first_stage"], **part}}
        with pytest.raises(ConfigError, match="first_stage: cannot be changed"):
            starting_point(config("none", extractor=other), str(path), device="cpu")


def test_an_extractor_is_a_mapping() -> None:
    with pytest.raises(ConfigError, match="must be a mapping"):
        config("none", extractor="ddpm")


def test_an_extractor_without_decoder_says_so() -> None:
    extractor = build_extractor({"name": "stain"})
    assert extractor.trainable("none") == []
    with pytest.raises(ConfigError, match="has no decoder"):
        extractor.trainable("decoder")
