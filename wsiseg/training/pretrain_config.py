"""Configurations of the pretraining: PathSegDiff's three stages, or a pixel-space denoiser.

Which of the two a mapping is shows in its extractor: pixel-space networks are named. Knows no
loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from wsiseg.config import from_mapping
from wsiseg.datasets.augment import AugmentConfig, check_scale
from wsiseg.errors import ConfigError, UsageError
from wsiseg.models.extractors.pathsegdiff import PathSegDiffConfig
from wsiseg.models.registry import EXTRACTORS, resolve
from wsiseg.training.autoencoder import AutoencoderConfig
from wsiseg.training.claim import essential
from wsiseg.training.dino import DinoConfig
from wsiseg.training.latent import DenoiserConfig
from wsiseg.training.loop import LoopConfig
from wsiseg.training.pixel_ddpm import PixelDDPMConfig
from wsiseg.training.tiles import SourceConfig

Stage = Literal["encoder", "autoencoder", "ldm", "ddpm"]
PIXEL_NETWORKS = ("genselfdiff", "ddpm")
"""Names of the extractors that predict noise in pixel space."""


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
class CommonConfig:
    """What every pretraining has."""

    stages: ClassVar[tuple[Stage, ...]]
    """The stages in their order."""
    extractor: Any
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
    """Variation of colours; crops are varied by `scale`, flips and quarter turns."""
    validation_share: float = 0.05
    """Share of each source's images or slides (groups, where it has them) that is not trained on
    but measured on, rounded up, at most half; 0 = none, and training images are measured on."""
    measure_every: int = 0
    """Steps between two measurements of a stage while it runs, beside the one at its end; 0 =
    none."""
    memory_gb: float = 4.0
    """Bound on the decoded images that each process holds, in 10^9 bytes; the rest is read again
    when its turn comes. Of slides nothing is held."""

    def __post_init__(self) -> None:
        check_scale(self.scale, "scale")
        if not self.sources or not self.mpp > 0 or self.seed < 0:
            raise ConfigError("give at least one source, an mpp above 0 and a seed from 0")
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"validation_share {self.validation_share}: must be 0 to below 1")
        if not self.memory_gb > 0:
            raise ConfigError(f"memory_gb {self.memory_gb}: must be above 0")
        if self.measure_every < 0:
            raise ConfigError(f"measure_every {self.measure_every}: must not be negative")
        for name in ("scale", "rotate", "elastic_px"):
            if getattr(self.augment, name) != getattr(AugmentConfig, name):
                raise ConfigError(
                    f"augment.{name}: has no effect here; crops are varied by `scale`, flips and "
                    "quarter turns, and by what augment says of colours"
                )


@dataclass(frozen=True)
class PretrainConfig(CommonConfig):
    """Configuration of PathSegDiff's three stages."""

    stages = ("encoder", "autoencoder", "ldm")
    extractor: PathSegDiffConfig
    """The architecture."""
    encoder: EncoderStage = EncoderStage()
    """First stage of the pretraining."""
    autoencoder: AutoencoderStage = AutoencoderStage()
    """Second stage."""
    ldm: DenoiserStage = DenoiserStage()
    """Third stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        patch, factor = self.extractor.encoder.patch_px, self.extractor.first_stage.factor
        if self.encoder.crop_px < patch:
            raise ConfigError(f"encoder.crop_px {self.encoder.crop_px}: must be at least {patch}")
        losses, side = self.autoencoder.autoencoder, self.autoencoder.crop_px
        if losses.feature_weight and side % patch:
            raise ConfigError(
                f"autoencoder.crop_px {side}: must be a multiple of {patch} for feature_weight"
            )
        least = 4 * losses.discriminator.stride
        if losses.discriminator.weight and side < least:
            raise ConfigError(f"autoencoder.crop_px {side}: the discriminator needs {least} px")
        for name, side, unit in (
            ("encoder.dino.global_px", self.encoder.dino.global_px, patch),
            ("encoder.dino.local_px", self.encoder.dino.local_px, patch),
            ("autoencoder.crop_px", self.autoencoder.crop_px, factor),
            ("ldm.crop_px", self.ldm.crop_px, factor * 8),
            ("ldm.crop_px", self.ldm.crop_px, patch),
        ):
            if side < unit or side % unit:
                raise ConfigError(f"{name} {side}: must be a multiple of {unit}")


@dataclass(frozen=True)
class PixelPretrainConfig(CommonConfig):
    """Configuration of a pixel-space denoiser's one stage; `extractor` is {name, ...its keys}."""

    stages = ("ddpm",)
    crop_px: int = 256
    """Side of a crop."""
    ddpm: PixelDDPMConfig = PixelDDPMConfig()
    """Losses."""
    loop: LoopConfig = LoopConfig()
    """Optimisation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        table = {name: EXTRACTORS[name] for name in PIXEL_NETWORKS}
        object.__setattr__(self, "extractor", resolve(self.extractor, table, "extractor"))
        try:
            resolve({**self.extractor, "tile_px": self.crop_px}, table, "extractor")
        except ConfigError as e:
            raise ConfigError(f"crop_px {self.crop_px}: does not fit the network ({e})") from e


def pretrain_config(data: Mapping[str, Any]) -> PretrainConfig | PixelPretrainConfig:
    """The configuration of a mapping, of the kind that its extractor shows.

    An extractor with a `name` is a pixel-space denoiser, one without is PathSegDiff.

    Raises:
        ConfigError: unknown or missing keys, values of the wrong type or out of range.
    """
    extractor = data.get("extractor")
    named = isinstance(extractor, Mapping) and "name" in extractor
    return from_mapping(PixelPretrainConfig, data) if named else from_mapping(PretrainConfig, data)


def stage_mapping(config: CommonConfig, stage: Stage) -> Any:
    """What of a configuration the weights of a stage depend on, as plain data.

    Of PathSegDiff's stages those before it come in as files, and those after it not at all.
    """
    data = essential(config)
    if isinstance(config, PixelPretrainConfig):
        return data
    data = {k: v for k, v in data.items() if k == stage or k not in config.stages}
    networks = {"encoder": ("encoder",), "autoencoder": ("encoder", "first_stage")}.get(stage)
    if networks is not None:
        data["extractor"] = {k: data["extractor"][k] for k in networks}
    return data


def needed(config: CommonConfig, stage: Stage) -> tuple[Stage, ...]:
    """The stages whose parts a stage is built on."""
    if isinstance(config, PretrainConfig):
        if stage == "ldm":
            return ("encoder", "autoencoder")
        if stage == "autoencoder" and config.autoencoder.autoencoder.feature_weight:
            return ("encoder",)
    return ()


def chosen_stages(config: CommonConfig, names: Sequence[str]) -> tuple[Stage, ...]:
    """The stages named, in their order; all of the configuration's if none is named.

    Raises:
        UsageError: a stage that the configuration has not.
    """
    for name in names:
        if name not in config.stages:
            raise UsageError(
                f"stage {name}: the configuration has no such stage; it has "
                f"{', '.join(config.stages)}"
            )
    return tuple(s for s in config.stages if not names or s in names)
