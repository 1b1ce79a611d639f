"""Views for the self-distillation."""

from __future__ import annotations

import torch

from wsiseg.datasets.augment import AugmentConfig
from wsiseg.models.extractors.vit import ViTConfig
from wsiseg.training.dino import DinoConfig, DinoTask
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
