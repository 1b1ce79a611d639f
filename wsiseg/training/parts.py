"""The files that the stages of the pretraining hand to one another. Knows no training.

A part is one safetensors file of a module's state dict with plain data (JSON) in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from wsiseg.atomic import staged
from wsiseg.config import difference, from_mapping, to_mapping
from wsiseg.errors import CheckpointError, ConfigError, UsageError
from wsiseg.models.extractors.latent import FirstStageConfig, build_first_stage
from wsiseg.models.extractors.pathsegdiff import PathSegDiffConfig
from wsiseg.models.extractors.vit import ViT
from wsiseg.models.storage import PART, sha256_of


def load_parts(
    config: PathSegDiffConfig, out: Path, *, mpp: float
) -> tuple[ViT, torch.nn.Module, FirstStageConfig]:
    """Encoder, first stage and the latter's configuration with its measured scale, from a run.

    Raises:
        CheckpointError: a part is missing or does not fit the configuration.
    """
    first_stage = build_first_stage(config.first_stage)
    encoder = load_encoder(config, out, mpp=mpp)
    path = out / "autoencoder.safetensors"
    meta = load_part(path, first_stage)
    try:
        held = from_mapping(FirstStageConfig, meta["network"])
    except (ConfigError, KeyError) as e:
        raise _unfit(path, "another version of wsiseg made it") from e
    own = replace(config.first_stage, scale=held.scale, shift=held.shift)
    _check_made(path, meta, own, mpp)
    return encoder, first_stage, held


def load_encoder(config: PathSegDiffConfig, out: Path, *, mpp: float) -> ViT:
    """The encoder of a run, on the CPU.

    Raises:
        CheckpointError: it is missing or does not fit the configuration.
    """
    path, encoder = out / "encoder.safetensors", ViT(config.encoder)
    _check_made(path, load_part(path, encoder), config.encoder, mpp)
    return encoder


def claim_parts(run: Path, paths: Sequence[Path]) -> None:
    """Keep which parts a stage builds on; refuse to resume it with others.

    Raises:
        UsageError: the folder holds a run that began with other parts.
        CheckpointError: a part is missing or cannot be read.
        OutputError: the folder cannot be written.
    """
    if not paths:
        return
    for path in paths:
        if not path.exists():
            raise _missing(path)
    record, digests = run / "parts.json", {path.name: sha256_of(path) for path in paths}
    if (run / "state.pt").exists() and record.exists():
        held = json.loads(record.read_text())
        for name, digest in digests.items():
            if held.get(name) != digest:
                raise UsageError(f"{run}: was started with another {name}; use another --out")
    with staged(record) as (temporary,):
        temporary.write_text(json.dumps(digests, indent=1))


def _check_made(path: Path, meta: Mapping[str, Any], network: Any, mpp: float) -> None:
    """Refuse a part of another architecture, of which the shapes may be the same, or resolution."""
    if text := difference(meta, made_of(network, mpp)):
        raise _unfit(path, text)


def made_of(network: Any, mpp: float) -> dict[str, Any]:
    """What is written beside a part's weights, which mean nothing without it."""
    return {"network": to_mapping(network), "mpp": mpp}


def save_part(path: Path, module: torch.nn.Module, meta: dict[str, Any]) -> Path:
    """Write a part's weights with plain data beside them, that of `made_of`.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors = {k: v.cpu().contiguous() for k, v in module.state_dict().items()}
    with staged(path, also=(SafetensorError,)) as (temporary,):
        save_file(tensors, temporary, metadata={PART: json.dumps(meta)})
    return path


def load_part(path: Path, module: torch.nn.Module) -> dict[str, Any]:
    """Fill a module from a file of `save_part` and return what was written beside.

    Raises:
        CheckpointError: the file is missing or does not fit the module.
    """
    try:
        module.load_state_dict(load_file(path))
        with safe_open(path, framework="pt") as file:
            meta: dict[str, Any] = json.loads(file.metadata()[PART])
            return meta
    except FileNotFoundError as e:
        raise _missing(path) from e
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as e:
        raise _unfit(path, "its weights cannot be read, or are of other shapes") from e


def _missing(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: not there; run the stage {path.stem} first")


def _unfit(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: does not fit the configuration ({why}); run {path.stem} again, in another --out"
    )
