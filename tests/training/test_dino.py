"""Views for the self-distillation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from wsiseg.datasets.augment import AugmentConfig
from wsiseg.models.extractors.vit import ViTConfig
from wsiseg.training.dino import DinoConfig, DinoTask, _spread
from wsiseg.training.loop import LoopConfig


def test_views_are_cut_exactly_at_low_precision() -> None:
    vit = ViTConfig(dim=8, depth=1, heads=1, patch_px=16, position_px=64)
    plain = AugmentConfig(stain_gain=0.0, stain_shift=0.0)
    task = DinoTask(vit, DinoConfig(prototypes=4), plain, LoopConfig())
    ramp = torch.linspace(-1, 1, 192).expand(4, 3, 192, 192)  # a position is a value
    views = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            generator = torch.Generator().manual_seed(1)
            views.append(task._view(ramp, 128, (0.4, 1.0), generator))
    assert views[1].dtype == torch.float32
    assert torch.equal(*views)


def test_spread_is_nothing_in_both_kinds_of_collapse() -> None:
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    same = torch.eye(4)[:1].expand(6, 4)
    alike = torch.full((6, 4), 0.25)
    for collapsed in (same, alike, rows[:1].expand(6, 4)):
        assert float(_spread(collapsed)) == pytest.approx(0, abs=1e-6)
    assert float(_spread(torch.eye(4))) == pytest.approx(math.log(4), abs=1e-6)
    assert 0.01 < float(_spread(rows)) < math.log(4)
    vit = ViTConfig(dim=8, depth=1, heads=1, patch_px=16, position_px=32)
    config = DinoConfig(global_px=32, local_count=0, prototypes=4)
    task = DinoTask(vit, config, AugmentConfig(), LoopConfig())
    teacher: Any = task.module["teacher"]
    torch.nn.init.zeros_(teacher["head"].prototypes)  # all images alike, all prototypes alike
    batch = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8)
    losses = task.losses(batch, 0, torch.Generator().manual_seed(0))
    assert float(losses["spread"]) == pytest.approx(0, abs=1e-6)
