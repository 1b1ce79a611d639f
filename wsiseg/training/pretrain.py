"""Pretraining of extractors on unlabelled tissue, stage by stage. Knows no labels.

PathSegDiff has three stages: encoder, autoencoder and conditioned denoiser; each writes its part
beside the run's state and the last one needs the first two. Pixel-space denoisers have one. The
last stage writes `extractor.safetensors`, which `wsiseg train` takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as nnf

from wsiseg.atomic import staged
from wsiseg.config import to_mapping
from wsiseg.errors import UsageError
from wsiseg.models.base import FeatureExtractor, to_tensor
from wsiseg.models.checkpoint import save_extractor
from wsiseg.models.devices import pick_device
from wsiseg.models.extractors.latent import encode
from wsiseg.models.extractors.pathsegdiff import PathSegDiffExtractor
from wsiseg.models.registry import build_extractor
from wsiseg.training.dino import DinoTask
from wsiseg.training.latent import AutoencoderTask, DenoiserTask, latent_statistics
from wsiseg.training.loop import LoopConfig, claim_run, resume_step, run_loop
from wsiseg.training.parts import load_parts, save_part
from wsiseg.training.pixel_ddpm import PixelDDPMTask, save_samples, timestep_errors
from wsiseg.training.pretrain_config import (
    CommonConfig,
    PixelPretrainConfig,
    PretrainConfig,
    Stage,
    chosen_stages,
)
from wsiseg.training.processes import Processes
from wsiseg.training.tiles import TilePool

__all__ = ["PixelPretrainConfig", "PretrainConfig", "denoising_error", "pretrain"]


def pretrain(
    stage: Stage,
    config: PretrainConfig | PixelPretrainConfig,
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    device: str = "cpu",
) -> Path:
    """Run one stage.

    Args:
        stage: which part to train, one of `config.stages`.
        config: configuration of all parts.
        data: folder that the sources' paths are relative to.
        out: run folder; `out/<stage>/` gets log, state and configuration.
        resume: continue from the state that is there.
        device: auto, cpu, cuda, cuda:N or mps; randomness is drawn on the CPU for all of them.

    Returns:
        The file with the part's weights.

    Raises:
        UsageError: the configuration has no such stage; the stage was run already and `resume` is
            off, or its configuration differs; several processes.
        DatasetError: a source matches no file.
        CheckpointError: an earlier stage is missing or damaged.
        ModelError: the device is not there, or the loss is no longer finite.
        OutputError: the run folder cannot be written.
    """
    chosen_stages(config, [stage])
    if Processes().count > 1:
        raise UsageError("pretraining runs in one process; start it without a launcher")
    run, target = out / stage, pick_device(device)
    claim_run(run, config, resume=resume)
    torch.manual_seed(config.seed)
    part = config if isinstance(config, PixelPretrainConfig) else getattr(config, stage)
    pool = TilePool.load(config.sources, data, mpp=config.mpp)
    print(f"{stage}: {len(pool)} images, {part.loop.steps} steps", flush=True)
    state = resume_step(run / "state.pt")
    crops = _Crops(pool, config, part.crop_px, part.loop)
    if isinstance(config, PixelPretrainConfig):
        return _ddpm(config, crops, state, out, target)
    runner = {"encoder": _encoder, "autoencoder": _autoencoder, "ldm": _denoiser}[stage]
    return runner(config, crops, state, out, target)


State = tuple[int, dict[str, Any] | None]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class _Crops(NamedTuple):
    """The numbered batches of a stage; batch n is the same in every process."""

    pool: TilePool
    config: CommonConfig
    crop_px: int
    loop: LoopConfig

    def one(self, number: int) -> Pixels:
        rng = np.random.default_rng((self.config.seed, number))
        count = self.loop.batch_size
        return self.pool.batch(self.crop_px, count, rng, scale=self.config.scale)

    def from_step(self, step: int, *, kept: int = 0) -> Iterator[Pixels]:
        """The batches from a step on; the first `kept` batches of all are left for reports."""
        return self.pool.batches(
            self.crop_px,
            self.loop.batch_size,
            seed=self.config.seed,
            start=step * self.loop.accumulate + kept,
            scale=self.config.scale,
        )


def _encoder(
    config: PretrainConfig, crops: _Crops, state: State, out: Path, device: torch.device
) -> Path:
    part = config.encoder
    task = DinoTask(config.extractor.encoder, part.dino, config.augment, part.loop)
    task.module.to(device)
    batches = crops.from_step(state[0])
    run_loop(task, batches, part.loop, run=out / "encoder", seed=config.seed, state=state)
    return save_part(out / "encoder.safetensors", task.encoder, {})


def _autoencoder(
    config: PretrainConfig, crops: _Crops, state: State, out: Path, device: torch.device
) -> Path:
    part = config.autoencoder
    task = AutoencoderTask(config.extractor.first_stage, part.autoencoder, config.augment)
    task.module.to(device)
    batches = crops.from_step(state[0])
    run_loop(task, batches, part.loop, run=out / "autoencoder", seed=config.seed, state=state)
    images = to_tensor(crops.one(part.loop.steps * part.loop.accumulate), device=device)
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
    batches = crops.from_step(state[0], kept=1)
    run_loop(task, batches, part.loop, run=out / "ldm", seed=config.seed, state=state)
    report = denoising_error(task, held_out, extractor.timesteps[0], seed=config.seed)
    network = PathSegDiffExtractor(extractor)
    average: Any = task.module["average"]
    for name, weights in (
        ("encoder", encoder),
        ("first_stage", first_stage),
        ("unet", average["unet"]),
        ("conditioner", average["conditioner"]),
    ):
        getattr(network, name).load_state_dict(weights.state_dict())
    return _finish("ldm", network, config, report, out)


def _ddpm(
    config: PixelPretrainConfig, crops: _Crops, state: State, out: Path, device: torch.device
) -> Path:
    task = PixelDDPMTask(build_extractor(config.extractor), config.ddpm, config.augment)
    task.module.to(device)
    held_out = to_tensor(crops.one(0), device=device)
    batches = crops.from_step(state[0], kept=1)
    run_loop(task, batches, config.loop, run=out / "ddpm", seed=config.seed, state=state)
    report = timestep_errors(task, held_out, seed=config.seed)
    save_samples(out / "ddpm" / "samples.png", task, held_out, seed=config.seed)
    return _finish("ddpm", task.average, config, report, out)


def _finish(
    stage: Stage,
    network: FeatureExtractor,
    config: CommonConfig,
    report: Mapping[str, float],
    out: Path,
) -> Path:
    """Write and print the report of the last stage and write the extractor."""
    with staged(out / stage / "metrics.json") as (temporary,):
        temporary.write_text(json.dumps(report, indent=1))
    print("  ".join(f"{k} {v:.4f}" for k, v in report.items()), flush=True)
    path = out / "extractor.safetensors"
    card = {"pretraining": to_mapping(config), "denoising_error": dict(report)}
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
