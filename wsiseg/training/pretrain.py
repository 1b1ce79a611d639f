"""Pretraining of PathSegDiff's frozen parts: encoder, autoencoder, conditioned denoiser.

Each stage writes its part beside the run's state; the last one needs the first two and writes
`extractor.safetensors`, which `wsiseg train` takes. Knows no labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional as nnf

from wsiseg.atomic import staged
from wsiseg.config import to_mapping
from wsiseg.datasets.augment import AugmentConfig, check_scale
from wsiseg.errors import ConfigError
from wsiseg.models.base import to_tensor
from wsiseg.models.checkpoint import save_extractor
from wsiseg.models.devices import pick_device
from wsiseg.models.extractors.latent import encode
from wsiseg.models.extractors.pathsegdiff import PathSegDiffConfig, PathSegDiffExtractor
from wsiseg.training.dino import DinoConfig, DinoTask
from wsiseg.training.latent import (
    AutoencoderConfig,
    AutoencoderTask,
    DenoiserConfig,
    DenoiserTask,
    latent_statistics,
)
from wsiseg.training.loop import LoopConfig, claim_run, resume_step, run_loop
from wsiseg.training.parts import load_parts, save_part
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

    def __post_init__(self) -> None:
        check_scale(self.scale, "scale")
        if not self.sources or not self.mpp > 0 or self.seed < 0:
            raise ConfigError("give at least one source, an mpp above 0 and a seed from 0")
        patch, factor = self.extractor.encoder.patch_px, self.extractor.first_stage.factor
        for name, side, unit in (
            ("encoder.dino.global_px", self.encoder.dino.global_px, patch),
            ("encoder.dino.local_px", self.encoder.dino.local_px, patch),
            ("autoencoder.crop_px", self.autoencoder.crop_px, factor),
            ("ldm.crop_px", self.ldm.crop_px, factor * 8),
            ("ldm.crop_px", self.ldm.crop_px, patch),
        ):
            if side < unit or side % unit:
                raise ConfigError(f"{name} {side}: must be a multiple of {unit}")


def pretrain(
    stage: Stage,
    config: PretrainConfig,
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    device: str = "cpu",
) -> Path:
    """Run one stage.

    Args:
        stage: which part to train.
        config: configuration of all parts.
        data: folder that the sources' paths are relative to.
        out: run folder; `out/<stage>/` gets log, state and configuration.
        resume: continue from the state that is there.
        device: auto, cpu, cuda, cuda:N or mps; randomness is drawn on the CPU for all of them.

    Returns:
        The file with the part's weights.

    Raises:
        UsageError: the stage was run already and `resume` is off, or its configuration differs.
        DatasetError: a source matches no file.
        CheckpointError: an earlier stage is missing or damaged.
        ModelError: the device is not there, or the loss is no longer finite.
        OutputError: the run folder cannot be written.
    """
    run, target = out / stage, pick_device(device)
    claim_run(run, config, resume=resume)
    torch.manual_seed(config.seed)
    part = getattr(config, stage)
    pool = TilePool.load(config.sources, data, mpp=config.mpp)
    print(f"{stage}: {len(pool)} images, {part.loop.steps} steps", flush=True)
    state = resume_step(run / "state.pt")
    runner = {"encoder": _encoder, "autoencoder": _autoencoder, "ldm": _denoiser}[stage]
    return runner(config, _Crops(pool, config, part), state, out, target)


State = tuple[int, dict[str, Any] | None]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class _Crops(NamedTuple):
    """The numbered batches of a stage; batch n is the same in every process."""

    pool: TilePool
    config: PretrainConfig
    part: EncoderStage | AutoencoderStage | DenoiserStage

    def one(self, number: int) -> Pixels:
        rng = np.random.default_rng((self.config.seed, number))
        count = self.part.loop.batch_size
        return self.pool.batch(self.part.crop_px, count, rng, scale=self.config.scale)

    def starting(self, number: int) -> Iterator[Pixels]:
        return self.pool.batches(
            self.part.crop_px,
            self.part.loop.batch_size,
            seed=self.config.seed,
            start=number,
            scale=self.config.scale,
        )


def _encoder(
    config: PretrainConfig, crops: _Crops, state: State, out: Path, device: torch.device
) -> Path:
    part = config.encoder
    task = DinoTask(config.extractor.encoder, part.dino, config.augment, part.loop)
    task.module.to(device)
    batches = crops.starting(state[0])
    run_loop(task, batches, part.loop, run=out / "encoder", seed=config.seed, state=state)
    return save_part(out / "encoder.safetensors", task.encoder, {})


def _autoencoder(
    config: PretrainConfig, crops: _Crops, state: State, out: Path, device: torch.device
) -> Path:
    part = config.autoencoder
    task = AutoencoderTask(config.extractor.first_stage, part.autoencoder, config.augment)
    task.module.to(device)
    batches = crops.starting(state[0])
    run_loop(task, batches, part.loop, run=out / "autoencoder", seed=config.seed, state=state)
    images = to_tensor(crops.one(part.loop.steps), device=device)
    measured = latent_statistics(task.module, config.extractor.first_stage, images)
    return save_part(out / "autoencoder.safetensors", task.module, to_mapping(measured))


def _denoiser(
    config: PretrainConfig, crops: _Crops, state: State, out: Path, device: torch.device
) -> Path:
    part = config.ldm
    encoder, first_stage, measured = load_parts(config.extractor, out)
    extractor = replace(config.extractor, first_stage=measured)
    task = DenoiserTask(
        extractor,
        part.denoiser,
        config.augment,
        encoder=encoder.to(device),
        first_stage=first_stage.to(device),
    )
    task.module.to(device)
    held_out = to_tensor(crops.one(0), device=device)
    batches = crops.starting(state[0] + 1)  # batch 0 is kept for the report
    run_loop(task, batches, part.loop, run=out / "ldm", seed=config.seed, state=state)
    report = denoising_error(task, held_out, extractor.timesteps[0], seed=config.seed)
    with staged(out / "ldm" / "metrics.json") as (temporary,):
        temporary.write_text(json.dumps(report, indent=1))
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
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        variants = {
            "conditioned": vectors,
            "null": torch.zeros_like(vectors),
            "shuffled": vectors.roll(1, dims=0),
        }
        return {
            name: float(task.error("average", latents, v, t, noise)) for name, v in variants.items()
        }
