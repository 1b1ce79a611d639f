"""The files that the stages of the pretraining hand to one another. Knows no training.

A part is one safetensors file of a module's state dict with plain data (JSON) in its metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from wsiseg.atomic import staged
from wsiseg.config import from_mapping
from wsiseg.errors import CheckpointError
from wsiseg.models.extractors.latent import FirstStageConfig, build_first_stage
from wsiseg.models.extractors.pathsegdiff import PathSegDiffConfig
from wsiseg.models.extractors.vit import ViT


def load_parts(
    config: PathSegDiffConfig, out: Path
) -> tuple[ViT, torch.nn.Module, FirstStageConfig]:
    """Encoder, first stage and the latter's configuration with its measured scale, from a run.

    Raises:
        CheckpointError: a part is missing or does not fit the configuration.
    """
    encoder = ViT(config.encoder)
    first_stage = build_first_stage(config.first_stage)
    load_part(out / "encoder.safetensors", encoder)
    meta = load_part(out / "autoencoder.safetensors", first_stage)
    return encoder, first_stage, from_mapping(FirstStageConfig, meta)


def save_part(path: Path, module: torch.nn.Module, meta: dict[str, Any]) -> Path:
    """Write a part's weights with plain data beside them.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors = {k: v.cpu().contiguous() for k, v in module.state_dict().items()}
    with staged(path, also=(SafetensorError,)) as (temporary,):
        save_file(tensors, temporary, metadata={"wsiseg.part": json.dumps(meta)})
    return path


def load_part(path: Path, module: torch.nn.Module) -> dict[str, Any]:
    """Fill a module from a file of `save_part` and return what was written beside.

    Raises:
        CheckpointError: the file is missing or does not fit the module.
    """
    try:
        module.load_state_dict(load_file(path))
        with safe_open(path, framework="pt") as file:
            meta: dict[str, Any] = json.loads(file.metadata()["wsiseg.part"])
            return meta
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: not there; run the stage {path.stem} first") from e
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"{path}: does not fit the configuration; run {path.stem} again"
        ) from e
