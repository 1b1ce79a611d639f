"""Pretraining of extractors on unlabelled tissue, stage by stage.

PathSegDiff has three stages: encoder, autoencoder and conditioned denoiser; each writes its part
beside the run's state and the last one needs the first two. Pixel-space denoisers have one. The
last stage writes `extractor.safetensors`, which `wsiseg train` takes. Labels are known to nothing
but the encoder's report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wsiseg.atomic import staged
from wsiseg.config import to_mapping
from wsiseg.errors import ConfigError, UsageError
from wsiseg.models.base import FeatureExtractor, to_tensor
from wsiseg.models.checkpoint import save_extractor
from wsiseg.models.devices import pick_device
from wsiseg.models.extractors.pathsegdiff import PathSegDiffExtractor
from wsiseg.models.extractors.vit import ViT
from wsiseg.models.registry import build_extractor
from wsiseg.training.autoencoder import AutoencoderTask, latent_statistics
from wsiseg.training.dino import DinoTask
from wsiseg.training.files import resume_step
from wsiseg.training.latent import DenoiserTask
from wsiseg.training.loop import LoopConfig, Task, claim_run, run_loop
from wsiseg.training.parts import load_part, load_parts, save_part
from wsiseg.training.pixel_ddpm import PixelDDPMTask
from wsiseg.training.pretrain_config import (
    PixelPretrainConfig,
    PretrainConfig,
    Stage,
    chosen_stages,
)
from wsiseg.training.pretrain_report import (
    Measured,
    report_autoencoder,
    report_denoiser,
    report_encoder,
    report_pixel_ddpm,
    write_report,
)
from wsiseg.training.processes import Processes
from wsiseg.training.tiles import Pools, load_pools, other_files

__all__ = ["PixelPretrainConfig", "PretrainConfig", "pretrain"]


def pretrain(
    stage: Stage,
    config: PretrainConfig | PixelPretrainConfig,
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    device: str = "cpu",
) -> Path:
    """Run one stage; in several processes each computes its share of every batch.

    Args:
        stage: which part to train, one of `config.stages`.
        config: configuration of all parts.
        data: folder that the sources' paths are relative to.
        out: run folder; `out/<stage>/` gets log, curves, state, configuration, metrics.json and
            pictures.
        resume: continue from the state that is there.
        device: auto, cpu, cuda, cuda:N or mps; randomness is drawn on the CPU for all of them.

    Returns:
        The file with the part's weights.

    Raises:
        UsageError: the configuration has no such stage; the stage was run already and `resume` is
            off, or its configuration or files differ; a batch that the processes cannot share; the
            device is not there.
        DatasetError: a source matches no file, or none that can be used.
        CheckpointError: an earlier stage is missing or damaged.
        ModelError: the loss is no longer finite.
        OutputError: the run folder cannot be written.
    """
    chosen_stages(config, [stage])
    part = config if isinstance(config, PixelPretrainConfig) else getattr(config, stage)
    processes, target = Processes(), pick_device(device)
    if part.loop.batch_size % processes.count:
        raise ConfigError(f"loop.batch_size: must be a multiple of {processes.count} processes")
    if processes.first:
        claim_run(out / stage, config, resume=resume)
    processes.wait()
    torch.manual_seed(config.seed)
    pools = load_pools(
        config.sources,
        data,
        mpp=config.mpp,
        validation_share=config.validation_share,
        seed=config.seed,
        memory_gb=config.memory_gb,
    )
    try:
        if processes.first:
            _claim_files(out / stage, pools, data)
        processes.wait()
        _check_files(out / stage, pools, data)
        if processes.first:
            counts = f"{len(pools.training)} images, {pools.held_out_images} held out"
            print(f"{stage}: {counts}, {part.loop.steps} steps", flush=True)
        return _STAGES[stage](_Run(stage, config, pools, part, out, target))
    finally:
        pools.slides.close()


@dataclass(frozen=True)
class _Run:
    """A stage at work."""

    stage: Stage
    config: Any
    pools: Pools
    part: Any
    out: Path
    device: torch.device

    @property
    def folder(self) -> Path:
        return self.out / self.stage

    @property
    def loop(self) -> LoopConfig:
        loop: LoopConfig = self.part.loop
        return loop

    def train(self, task: Task) -> None:
        """All steps of a task, from where its state stands."""
        task.module.to(self.device)
        state, processes = resume_step(self.folder / "state.pt"), Processes()
        batches = self.pools.training.batches(
            self.part.crop_px,
            self.loop.batch_size,
            seed=self.config.seed,
            start=state[0] * self.loop.accumulate,
            scale=self.config.scale,
            share=(processes.index, processes.count),
        )
        with closing(batches):  # type: ignore[type-var]
            run_loop(task, batches, self.loop, run=self.folder, seed=self.config.seed, state=state)

    def measured(self, size_px: int) -> Measured:
        """Crops to measure on."""
        size = self.loop.batch_size
        return Measured(self.pools, size_px, size, self.config.seed, self.device)

    def finish(self, name: str, write: Callable[[Path], None]) -> Path:
        """The file of a name, which the first process writes."""
        path, processes = self.out / name, Processes()
        if processes.first:
            write(path)
        processes.wait()
        return path


def _encoder(run: _Run) -> Path:
    config: PretrainConfig = run.config
    part = config.encoder
    task = DinoTask(config.extractor.encoder, part.dino, config.augment, part.loop)
    run.train(task)

    def write(path: Path) -> None:
        encoder, measured = task.encoder.eval(), run.measured(config.extractor.tile_px)
        write_report(run.folder, report_encoder(encoder, measured, run.folder))
        save_part(path, encoder, {})

    return run.finish("encoder.safetensors", write)


def _autoencoder(run: _Run) -> Path:
    config: PretrainConfig = run.config
    part, first_stage = config.autoencoder, config.extractor.first_stage
    encoder = None
    if part.autoencoder.feature_weight:
        encoder = ViT(config.extractor.encoder)
        load_part(run.out / "encoder.safetensors", encoder)
        encoder.to(run.device)
    torch.manual_seed(config.seed)
    task = AutoencoderTask(first_stage, part.autoencoder, config.augment, encoder=encoder)
    run.train(task)

    def write(path: Path) -> None:
        measured = run.measured(part.crop_px)
        write_report(run.folder, report_autoencoder(task, measured, run.folder))
        key = (config.seed, part.loop.steps * part.loop.accumulate)
        size = part.loop.batch_size
        pixels = run.pools.training.batch(part.crop_px, size, key, scale=config.scale)
        images = to_tensor(pixels, device=run.device)
        save_part(
            path, task.network, to_mapping(latent_statistics(task.network, first_stage, images))
        )

    return run.finish("autoencoder.safetensors", write)


def _denoiser(run: _Run) -> Path:
    config: PretrainConfig = run.config
    encoder, first_stage, measured = load_parts(config.extractor, run.out)
    extractor = replace(config.extractor, first_stage=measured)
    task = DenoiserTask(
        extractor,
        config.ldm.denoiser,
        config.augment,
        encoder=encoder.to(run.device),
        first_stage=first_stage.to(run.device),
    )
    run.train(task)

    def write(path: Path) -> None:
        report = report_denoiser(task, run.measured(config.ldm.crop_px), run.folder)
        network = PathSegDiffExtractor(extractor)
        average: Any = task.module["average"]
        for name, weights in (
            ("encoder", encoder),
            ("first_stage", first_stage),
            ("unet", average["unet"]),
            ("conditioner", average["conditioner"]),
        ):
            getattr(network, name).load_state_dict(weights.state_dict())
        _write_extractor(path, run, network, report)

    return run.finish("extractor.safetensors", write)


def _ddpm(run: _Run) -> Path:
    config: PixelPretrainConfig = run.config
    task = PixelDDPMTask(build_extractor(config.extractor), config.ddpm, config.augment)
    run.train(task)

    def write(path: Path) -> None:
        report = report_pixel_ddpm(task, run.measured(config.crop_px), run.folder)
        _write_extractor(path, run, task.average, report)

    return run.finish("extractor.safetensors", write)


def _claim_files(run: Path, pools: Pools, data: Path) -> None:
    """Keep which files a stage trains and measures on; refuse to resume with others.

    Raises:
        UsageError: the folder holds a run with other files, or of a version that kept none.
    """
    record = run / "files.json"
    if (run / "state.pt").exists():
        if not record.exists():
            raise UsageError(f"{run}: was started by another version of wsiseg; use another --out")
        _check_files(run, pools, data)
    with staged(record) as (temporary,):
        temporary.write_text(pools.record(data))


def _check_files(run: Path, pools: Pools, data: Path) -> None:
    """Refuse other files than those that are kept, as where one process cannot use one of them.

    Raises:
        UsageError: names one of them.
    """
    record = run / "files.json"
    if record.exists() and (other := other_files(record.read_text(), pools.record(data))):
        raise UsageError(f"{run}: was started {other} use another --out")


def _write_extractor(
    path: Path, run: _Run, network: FeatureExtractor, report: Mapping[str, float]
) -> None:
    """The report of the last stage, and the extractor with it in its card."""
    write_report(run.folder, report)
    card = {"pretraining": to_mapping(run.config), "denoising_error": dict(report)}
    save_extractor(path, network, card=card, licence=run.config.licence)


_STAGES: Mapping[Stage, Callable[[_Run], Path]] = {
    "encoder": _encoder,
    "autoencoder": _autoencoder,
    "ldm": _denoiser,
    "ddpm": _ddpm,
}
