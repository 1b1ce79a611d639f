"""Pretraining of extractors on unlabelled tissue, stage by stage.

PathSegDiff has three stages: encoder, autoencoder and conditioned denoiser; each writes its part
beside the run's state and the last one needs the first two. Pixel-space denoisers have one. The
last stage writes `extractor.safetensors`, which `wsiseg train` takes. Labels are known to nothing
but the encoder's report.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wsiseg.atomic import staged
from wsiseg.config import to_mapping
from wsiseg.errors import ConfigError, UsageError
from wsiseg.models.base import FeatureExtractor
from wsiseg.models.checkpoint import save_extractor
from wsiseg.models.devices import pick_device
from wsiseg.models.extractors.pathsegdiff import PathSegDiffExtractor
from wsiseg.models.registry import build_extractor
from wsiseg.training.autoencoder import AutoencoderTask, latent_statistics
from wsiseg.training.claim import check_run, claim_run
from wsiseg.training.dino import DinoTask
from wsiseg.training.latent import DenoiserTask
from wsiseg.training.parts import claim_parts, load_encoder, load_parts, made_of, save_part
from wsiseg.training.pixel_ddpm import PixelDDPMTask
from wsiseg.training.pretrain_config import (
    PixelPretrainConfig,
    PretrainConfig,
    Stage,
    chosen_stages,
    needed,
    stage_mapping,
)
from wsiseg.training.pretrain_report import (
    report_autoencoder,
    report_denoiser,
    report_encoder,
    report_pixel_ddpm,
)
from wsiseg.training.processes import Processes
from wsiseg.training.stage_run import StageRun
from wsiseg.training.tiles import Pools, divide, find_files, other_files, warn_of_small

__all__ = ["PixelPretrainConfig", "PretrainConfig", "check_stages", "pretrain"]


def check_stages(
    stages: Sequence[Stage],
    config: PretrainConfig | PixelPretrainConfig,
    *,
    out: Path,
    resume: bool = False,
) -> None:
    """Refuse stages that could not begin, before the first of them trains for days.

    Raises:
        UsageError: the configuration has no such stage; one was run already and `resume` is off,
            or its configuration differs; a batch that the processes cannot share.
    """
    count = Processes().count
    for stage in chosen_stages(config, stages):
        part, where = _part(config, stage)
        if part.loop.batch_size % count:
            raise ConfigError(f"{where}loop.batch_size: must be a multiple of {count} processes")
        check_run(out / stage, config, resume=resume, of=partial(stage_mapping, stage=stage))


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
    check_stages([stage], config, out=out, resume=resume)
    part, _ = _part(config, stage)
    processes, target = Processes(), pick_device(device)
    if processes.first:
        claim_run(out / stage, config, resume=resume, of=partial(stage_mapping, stage=stage))
    processes.wait()
    torch.manual_seed(config.seed)
    pools = _pools(config, data, out)
    try:
        if processes.first:
            sides = [pool for pool in (pools.training, pools.held_out) if pool is not None]
            warn_of_small(sides, part.crop_px, config.scale)
            _claim_files(out / stage, pools, data)
            claim_parts(
                out / stage, [out / f"{name}.safetensors" for name in needed(config, stage)]
            )
            _warn_of_other_files(out, config.stages, stage)
        processes.wait()
        _check_files(out / stage, pools, data)
        if processes.first:
            counts = f"{len(pools.training)} images, {pools.held_out_images} held out"
            print(f"{stage}: {counts}, {part.loop.steps} steps", flush=True)
        return _STAGES[stage](StageRun(stage, config, pools, part, out, target))
    finally:
        pools.slides.close()


def _part(config: PretrainConfig | PixelPretrainConfig, stage: Stage) -> tuple[Any, str]:
    """The configuration of a stage, and what its keys begin with."""
    if isinstance(config, PixelPretrainConfig):
        return config, ""
    return getattr(config, stage), f"{stage}."


def _pools(config: Any, data: Path, out: Path) -> Pools:
    """The files of all sources; the first process looks for the tissue of slides, once a run."""
    processes = Processes()
    if not processes.first:
        processes.wait()
    found = find_files(
        config.sources, data, mpp=config.mpp, memory_gb=config.memory_gb, kept=out / "tissue"
    )
    if processes.first:
        processes.wait()
    return divide(found, validation_share=config.validation_share, seed=config.seed)


def _encoder(run: StageRun) -> Path:
    config: PretrainConfig = run.config
    part = config.encoder
    task = DinoTask(config.extractor.encoder, part.dino, config.augment, part.loop)
    patch = config.extractor.encoder.patch_px
    side = min(config.extractor.tile_px, part.crop_px)  # of larger ones images may be too small
    measured = run.measured(side // patch * patch)

    def report() -> Mapping[str, float]:
        return report_encoder(task.encoder.eval(), measured, run.folder)

    def write(path: Path, _: Mapping[str, float]) -> None:
        save_part(path, task.encoder, made_of(config.extractor.encoder, config.mpp))

    return run.finish(task, report, "encoder.safetensors", write)


def _autoencoder(run: StageRun) -> Path:
    config: PretrainConfig = run.config
    part, first_stage = config.autoencoder, config.extractor.first_stage
    encoder = None
    if part.autoencoder.feature_weight:
        encoder = load_encoder(config.extractor, run.out, mpp=config.mpp).to(run.device)
    torch.manual_seed(config.seed)
    task = AutoencoderTask(first_stage, part.autoencoder, config.augment, encoder=encoder)
    measured = run.measured(part.crop_px)

    def report() -> Mapping[str, float]:
        return report_autoencoder(task, measured, run.folder)

    def write(path: Path, _: Mapping[str, float]) -> None:
        crops = measured.training_crops(config.scale)
        network = latent_statistics(task.network, first_stage, crops)
        save_part(path, task.network, made_of(network, config.mpp))

    return run.finish(task, report, "autoencoder.safetensors", write)


def _denoiser(run: StageRun) -> Path:
    config: PretrainConfig = run.config
    encoder, first_stage, held = load_parts(config.extractor, run.out, mpp=config.mpp)
    extractor = replace(config.extractor, first_stage=held)
    task = DenoiserTask(
        extractor,
        config.ldm.denoiser,
        config.augment,
        encoder=encoder.to(run.device),
        first_stage=first_stage.to(run.device),
    )
    measured = run.measured(config.ldm.crop_px)

    def report() -> Mapping[str, float]:
        return report_denoiser(task, measured, run.folder)

    def write(path: Path, found: Mapping[str, float]) -> None:
        network = PathSegDiffExtractor(extractor)
        average: Any = task.module["average"]
        for name, weights in (
            ("encoder", encoder),
            ("first_stage", first_stage),
            ("unet", average["unet"]),
            ("conditioner", average["conditioner"]),
        ):
            getattr(network, name).load_state_dict(weights.state_dict())
        _write_extractor(path, run, network, found)

    return run.finish(task, report, "extractor.safetensors", write)


def _ddpm(run: StageRun) -> Path:
    config: PixelPretrainConfig = run.config
    task = PixelDDPMTask(build_extractor(config.extractor), config.ddpm, config.augment)
    measured = run.measured(config.crop_px)

    def report() -> Mapping[str, float]:
        return report_pixel_ddpm(task, measured, run.folder)

    def write(path: Path, found: Mapping[str, float]) -> None:
        _write_extractor(path, run, task.average, found)

    return run.finish(task, report, "extractor.safetensors", write)


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


def _warn_of_other_files(out: Path, stages: Sequence[Stage], stage: Stage) -> None:
    """Say where a stage before was trained on other files than this one: what is held out of this
    one may be known to it."""
    own = (out / stage / "files.json").read_text()
    records = {s: out / s / "files.json" for s in stages[: stages.index(stage)]}
    there = {s: record.read_text() for s, record in records.items() if record.exists()}
    if other := [s for s, files in there.items() if other_files(files, own)]:
        warnings.warn(
            f"{stage}: the files are not those of the stage {other[0]} (another seed, source or"
            " share), so what is measured on may have been trained on there",
            stacklevel=3,
        )


def _write_extractor(
    path: Path, run: StageRun, network: FeatureExtractor, found: Mapping[str, float]
) -> None:
    """The extractor, with how it was made, and what was `found` of it, in its card."""
    made = to_mapping(run.config)
    for before in needed(run.config, run.stage):  # as they ran; this run may say otherwise
        record = run.out / before / "config.json"
        if record.exists():
            made[before] = json.loads(record.read_text())[before]
    card = {"pretraining": made, "denoising_error": dict(found)}
    save_extractor(path, network, card=card, licence=run.config.licence)


_STAGES: Mapping[Stage, Callable[[StageRun], Path]] = {
    "encoder": _encoder,
    "autoencoder": _autoencoder,
    "ldm": _denoiser,
    "ddpm": _ddpm,
}
