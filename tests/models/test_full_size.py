"""The full-size architectures, on the meta device: counts of the paper's Table 1, no memory."""

from __future__ import annotations

import pytest
import torch
from compvis_layout import Autoencoder, UNet, dino_vit
from torch import nn

from wsiseg.models import zoo
from wsiseg.models.describe import describe
from wsiseg.models.extractors.pathsegdiff import PathSegDiffExtractor
from wsiseg.models.registry import extractor_skeleton

TABLE_1 = {
    "hipt": 21_665_664,
    "unet": 400_920_579,
    "first_stage": 55_322_782,
    "conditioner": 590_848,
    "fcn": 17_470_150,
}
INCEPTION = 21_785_568


def test_counts_of_table_1() -> None:
    about = describe("pathsegdiff-brca")
    assert {k: about[k] for k in TABLE_1} == TABLE_1
    ldm = sum(TABLE_1[k] for k in ("unet", "first_stage", "conditioner")) + INCEPTION
    assert ldm == 478_619_777
    assert sum(row["channels"] for row in about["features"]) == 7_296
    assert [r["side"] for r in about["features"]] == [8, 8, 8, 16, 16, 16, 32, 32, 32, *[64] * 4]
    assert about["total"] == sum(TABLE_1.values())
    assert describe("pathsegdiff-brca", class_count=2)["fcn"] == 17_470_150 - 4 * (64 * 9 + 1)


def test_no_weight_is_allocated() -> None:
    entry = zoo.MODELS["pathsegdiff-brca"]
    extractor = extractor_skeleton(entry.extractor)
    assert isinstance(extractor, PathSegDiffExtractor)
    assert all(t.is_meta for t in (*extractor.parameters(), *extractor.buffers()))
    assert all(t.is_meta for t in extractor.state_dict().values())
    assert extractor.config.first_stage.factor == 4


def test_the_kl_variant() -> None:
    about = describe("pathsegdiff-kl")
    first = extractor_skeleton(zoo.MODELS["pathsegdiff-kl"].extractor)
    assert isinstance(first, PathSegDiffExtractor)
    assert first.config.first_stage.factor == 8
    assert about["first_stage"] == 83_653_863  # CompVis' published kl-f8
    assert about["unet"] == TABLE_1["unet"] + 2 * 192 * 9 + 1  # one more channel in and out
    assert about["features"][0]["side"] == 4


def test_the_null_variant_is_the_same_architecture() -> None:
    null, full = describe("pathsegdiff-brca-null"), describe("pathsegdiff-brca")
    assert {k: null[k] for k in TABLE_1} == TABLE_1
    assert null["config"]["extractor"] == {**full["config"]["extractor"], "conditioning": "null"}
    assert "stand-in" in null["summary"]


@pytest.mark.parametrize("part", ["unet", "first_stage", "hipt"])
def test_the_original_layout_has_the_same_counts(part: str) -> None:
    """The layout that the import is tested with is that of the full-size checkpoints."""
    with torch.device("meta"):
        original: nn.Module = (
            UNet(3, (192, 384, 576, 960), 512)
            if part == "unet"
            else Autoencoder((128, 256, 512), 3, 8192)
        )
    if part == "hipt":
        assert sum(t.numel() for t in dino_vit(384, 12, 0).values()) == TABLE_1["hipt"]
        return
    tensors = {"unet": 688, "first_stage": 205}[part]
    assert len(original.state_dict()) == tensors
    assert sum(p.numel() for p in original.parameters()) == TABLE_1[part]
