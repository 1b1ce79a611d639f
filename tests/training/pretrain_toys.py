"""A pretraining of seconds: its configuration, its tissue and how it is stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsiseg.config import from_mapping
from wsiseg.training import loop
from wsiseg.training.pretrain import PretrainConfig

EXTRACTOR: dict[str, Any] = {
    "encoder": {"dim": 16, "depth": 1, "heads": 2, "patch_px": 16, "position_px": 32},
    "first_stage": {
        "kind": "vq",
        "channels": [8, 8, 8],
        "layers": 1,
        "latent_channels": 2,
        "groups": 4,
        "codes": 16,
    },
    "unet": {"channels": [8, 8, 16, 16], "layers": 2, "context_dim": 16, "groups": 4},
    "region_dim": 0,
    "tile_px": 32,
}
SOURCES = [
    {"path": "light_*.png", "label": "light", "group": "(g[0-9]+)_"},
    {"path": "dark_*.png", "label": "dark", "group": "(g[0-9]+)_"},
]
STAGES = ("encoder", "autoencoder", "ldm")


def made(steps: int = 2, **changes: Any) -> PretrainConfig:
    loop_ = {"batch_size": 4, "warmup_steps": 1, "log_every": 2, "save_every": 1, "steps": steps}
    dino = {"global_px": 32, "local_px": 16, "local_count": 1, "prototypes": 8, "mask_share": 0.5}
    data = {
        "extractor": EXTRACTOR,
        "mpp": 1.0,
        "sources": SOURCES,
        "validation_share": 0.25,
        "augment": {"stain_gain": 0.0, "stain_shift": 0.0},
        "encoder": {"crop_px": 32, "dino": dino, "loop": loop_},
        "autoencoder": {"crop_px": 32, "loop": loop_},
        "ldm": {"crop_px": 32, "loop": loop_},
    }
    for name, value in changes.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) else value  # type: ignore[dict-item]
    return from_mapping(PretrainConfig, data)


def write_tissue(folder: Path) -> None:
    """Eight light and eight dark images, copies two by two."""
    rng = np.random.default_rng(0)
    for name, value in (("light", 200), ("dark", 70)):
        for number in range(8):
            pixels = rng.normal(value, 25, (48, 56, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}_g{number // 2}_{number % 2}.png")


def report(out: Path, stage: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((out / stage / "metrics.json").read_text())
    return found


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save = loop._save

    def stop(path: Path, task: Any, optimiser: Any, done: int, seconds: float) -> None:
        save(path, task, optimiser, done, seconds)
        if done == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", stop)
