"""Pretraining of PathSegDiff's frozen parts: encoder, autoencoder, conditioned denoiser.

Each stage writes its part beside the run's state; the last one needs the first two and writes
`extractor.safetensors`, which `wsiseg train` takes. Knows no labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as nnf

from wsiseg.config import from_mapping, to_mapping
from wsiseg.datasets.augment import AugmentConfig
from wsiseg.errors import CheckpointError
from wsiseg.models.base import to_tensor
from wsiseg.models.checkpoint import save_extractor
from wsiseg.models.extractors.latent import FirstStageConfig, build_first_stage, encode
from wsiseg.models.extractors.pathsegdiff import PathSegDiffConfig, PathSegDiffExtractor
from wsiseg.models.extractors.vit import ViT
from wsiseg.training.dino import DinoConfig, DinoTask
from wsiseg.training.latent import (
    AutoencoderConfig,
    AutoencoderTask,
    DenoiserConfig,
    DenoiserTask,
    latent_statistics,
)
from wsiseg.training.loop import LoopConfig, claim_run, resume_step, run_loop
from wsiseg.training.tiles import SourceConfig, TilePool

Stage = Literal["encoder", "autoencoder", "ldm"]
STAGES: tuple[Stage, ...] = ("encoder", "autoencoder", "ldm")


@dataclass(frozen=True)
class EncoderStage:
    """The self-supervised encoder."""

    crop_px: int = 160
    """Side of the crop that global and local views are cut from."""
    dino: DinoConfig = DinoConfig()
    """Self-distillation."""
    loop: LoopConfig = LoopConfig()
    """Optimisation."""


@dataclass(frozen=True)
class AutoencoderStage:
    """The first stage."""

    crop_px: int = 128
    """Side of a crop."""
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    """Losses."""
    loop: LoopConfig = LoopConfig()
    """Optimisation."""


@dataclass(frozen=True)
class DenoiserStage:
    """The conditioned denoiser."""

    crop_px: int = 256
    """Side of a crop."""
    denoiser: DenoiserConfig = DenoiserConfig()
    """Losses."""
    loop: LoopConfig = LoopConfig()
    """Optimisation."""


@dataclass(frozen=True)
class PretrainConfig:
    """Configuration of all three stages."""

    extractor: PathSegDiffConfig
    """The architecture."""
    sources: tuple[SourceConfig, ...]
    """Unlabelled tissue."""
    mpp: float = 0.5
    """Micrometres per pixel to pretrain at."""
    licence: str = "unknown"
    """Terms of the weights, which follow from the sources'."""
    seed: int = 0
    """Seed of weights, crops and noise."""
    scale: tuple[float, float] = (0.75, 1.33)
    """Range of the crops' magnification."""
    augment: AugmentConfig = AugmentConfig()
    """Stain variation."""
    encoder: EncoderStage = EncoderStage()
    """First stage of the pretraining."""
    autoencoder: AutoencoderStage = AutoencoderStage()
    """Second stage."""
    ldm: DenoiserStage = DenoiserStage()
    """Third stage."""


def pretrain(
    stage: Stage, config: PretrainConfig, *, data: Path, out: Path, resume: bool = False
) -> Path:
    """Run one stage.

    Args:
        stage: which part to train.
        config: configuration of all parts.
        data: folder that the sources' paths are relative to.
        out: run folder; `out/<stage>/` gets log, state and configuration.
        resume: continue from the state that is there.

    Returns:
        The file with the part's weights.

    Raises:
        UsageError: the stage was run already and `resume` is off, or its configuration differs.
        DatasetError: a source matches no file.
        CheckpointError: an earlier stage is missing or damaged.
    """
    run = out / stage
    claim_run(run, config, resume=resume)
    torch.manual_seed(config.seed)
    part = getattr(config, stage)
    pool = TilePool.load(config.sources, data, mpp=config.mpp)
    print(f"{stage}: {len(pool)} images, {part.loop.steps} steps", flush=True)
    state = resume_step(run / "state.pt")
    batches = pool.batches(
        part.crop_px, part.loop.batch_size, seed=config.seed, start=state[0], scale=config.scale
    )
    runner = {"encoder": _encoder, "autoencoder": _autoencoder, "ldm": _denoiser}[stage]
    return runner(config, batches, out, state)


State = tuple[int, dict[str, Any] | None]
Batches = Iterator[np.ndarray[Any, np.dtype[np.uint8]]]


def _encoder(config: PretrainConfig, batches: Batches, out: Path, state: State) -> Path:
    part = config.encoder
    task = DinoTask(config.extractor.encoder, part.dino, config.augment, part.loop)
    run_loop(task, batches, part.loop, run=out / "encoder", seed=config.seed, state=state)
    return _save_part(out / "encoder.safetensors", task.encoder, {})


def _autoencoder(config: PretrainConfig, batches: Batches, out: Path, state: State) -> Path:
    part = config.autoencoder
    task = AutoencoderTask(config.extractor.first_stage, part.autoencoder, config.augment)
    run_loop(task, batches, part.loop, run=out / "autoencoder", seed=config.seed, state=state)
    images = to_tensor(next(batches))
    measured = latent_statistics(task.module, config.extractor.first_stage, images)
    return _save_part(out / "autoencoder.safetensors", task.module, to_mapping(measured))


def _denoiser(config: PretrainConfig, batches: Batches, out: Path, state: State) -> Path:
    part = config.ldm
    encoder, first_stage, measured = load_parts(config.extractor, out)
    extractor = replace(config.extractor, first_stage=measured)
    task = DenoiserTask(
        extractor, part.denoiser, config.augment, encoder=encoder, first_stage=first_stage
    )
    held_out = to_tensor(next(batches))
    run_loop(task, batches, part.loop, run=out / "ldm", seed=config.seed, state=state)
    report = denoising_error(task, held_out, extractor.timesteps[0], seed=config.seed)
    (out / "ldm" / "metrics.json").write_text(json.dumps(report, indent=1))
    print("  ".join(f"{k} {v:.4f}" for k, v in report.items()), flush=True)
    network = PathSegDiffExtractor(extractor)
    average: Any = task.module["average"]
    for name, weights in (
        ("encoder", encoder),
        ("first_stage", first_stage),
        ("unet", average["unet"]),
        ("conditioner", average["conditioner"]),
    ):
        getattr(network, name).load_state_dict(weights.state_dict())
    path = out / "extractor.safetensors"
    card = {"pretraining": to_mapping(config), "denoising_error": report}
    save_extractor(path, network, card=card, licence=config.licence)
    return path


def denoising_error(
    task: DenoiserTask, images: torch.Tensor, timestep: int, *, seed: int
) -> dict[str, float]:
    """Mean squared error of the noise predicted by the averaged weights at one timestep.

    Returns:
        `conditioned` with each image's own vector, `null` with the null condition, `shuffled`
        with another image's vector: conditioning is used where the first is the lowest.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        latents = encode(task.first_stage, task.config.first_stage, images)
        vectors = nnf.normalize(task.encoder(images), dim=-1)
        t = torch.full((len(images),), timestep)
        noise = torch.randn(latents.shape, generator=generator)
        variants = {
            "conditioned": vectors,
            "null": torch.zeros_like(vectors),
            "shuffled": vectors.roll(1, dims=0),
        }
        return {
            name: float(task.error("average", latents, v, t, noise)) for name, v in variants.items()
        }


def load_parts(
    config: PathSegDiffConfig, out: Path
) -> tuple[ViT, torch.nn.Module, FirstStageConfig]:
    """Encoder, first stage and the latter's configuration with its measured scale, from a run.

    Raises:
        CheckpointError: a part is missing or does not fit the configuration.
    """
    encoder = ViT(config.encoder)
    first_stage = build_first_stage(config.first_stage)
    _load_part(out / "encoder.safetensors", encoder)
    meta = _load_part(out / "autoencoder.safetensors", first_stage)
    return encoder, first_stage, from_mapping(FirstStageConfig, meta)


def _save_part(path: Path, module: torch.nn.Module, meta: dict[str, Any]) -> Path:
    tensors = {k: v.contiguous() for k, v in module.state_dict().items()}
    save_file(tensors, path, metadata={"wsiseg.part": json.dumps(meta)})
    return path


def _load_part(path: Path, module: torch.nn.Module) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

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
