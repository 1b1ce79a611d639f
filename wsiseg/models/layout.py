"""Widths of the authors' networks, read off the shapes of their tensors. Knows no files.

What shapes cannot tell is fixed by the originals: 32 groups a group norm, one attention head in
the U-Net, heads of 64 in the vision transformer, two blocks a level in the U-Net.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

UNET = "model.diffusion_model."
_FIRST_STAGE = "first_stage_model."
_KL_SCALE = 0.18215


def infer_unet(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keys of UNetConfig from model.diffusion_model.*.

    Raises:
        KeyError: a tensor that tells a width is missing.
    """
    levels = [f"{UNET}input_blocks.{i}.0.out_layers.3.weight" for i in (1, 4, 7, 10)]
    context = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    return {
        "channels": [int(tensors[name].shape[0]) for name in levels],
        "context_dim": int(tensors[context].shape[1]),
    }


def infer_first_stage(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keys of FirstStageConfig from first_stage_model.* and the scale factor.

    Raises:
        KeyError: a tensor that tells a width is missing.
    """
    down = f"{_FIRST_STAGE}encoder.down."
    levels = _count(tensors, down)
    codes = tensors.get(f"{_FIRST_STAGE}quantize.embedding.weight")
    kind = "kl" if codes is None else "vq"
    scale = 1.0 if kind == "vq" else _KL_SCALE
    if "scale_factor" in tensors:
        scale = float(tensors["scale_factor"])
    moments = int(tensors[f"{_FIRST_STAGE}quant_conv.weight"].shape[0])
    found: dict[str, Any] = {
        "kind": kind,
        "channels": [
            int(tensors[f"{down}{i}.block.0.conv2.weight"].shape[0]) for i in range(max(levels, 1))
        ],
        "layers": _count(tensors, f"{down}0.block."),
        "latent_channels": moments if kind == "vq" else moments // 2,
        "scale": scale,
    }
    if codes is not None:
        found["codes"] = int(codes.shape[0])
    return found


def infer_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keys of ViTConfig from the state dict of a vision transformer.

    Raises:
        KeyError: a tensor that tells a width is missing.
    """
    patch = int(tensors["patch_embed.proj.weight"].shape[-1])
    positions, dim = (int(n) for n in tensors["pos_embed"].shape[1:])
    return {
        "dim": dim,
        "depth": _count(tensors, "blocks."),
        "heads": max(1, dim // 64),
        "patch_px": patch,
        "position_px": math.isqrt(positions - 1) * patch,
    }


def infer_schedule(betas: Tensor) -> dict[str, Any]:
    """Keys of ScheduleConfig from the betas; the kind stays the originals' scaled_linear."""
    first, last = (float(f"{float(betas[i]):.5g}") for i in (0, -1))
    return {"steps": len(betas), "beta_start": first, "beta_end": last}


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many different numbers follow a prefix."""
    rest = (n.removeprefix(prefix).partition(".")[0] for n in tensors if n.startswith(prefix))
    return len(set(rest))
