"""The configuration of a training run. Knows no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from wsiseg.datasets.augment import AugmentConfig
from wsiseg.errors import ConfigError
from wsiseg.objects import ObjectsConfig
from wsiseg.training.background import BackgroundConfig
from wsiseg.training.loop import LoopConfig
from wsiseg.training.losses import LossConfig


@dataclass(frozen=True)
class FeatureCacheConfig:
    """Features of a frozen extractor kept on disk, in the run folder."""

    patches: int = 0
    """After how many augmented patches the sequence begins again, but not before it went
    through all images; 0 = never, and no cache."""
    limit_gb: float = 20.0
    """Size that the cache may reach, with 1 GB of the disk left free; what does not fit is
    computed each time."""

    def __post_init__(self) -> None:
        if self.patches < 0 or not self.limit_gb > 0:
            raise ConfigError("feature_cache: patches must be from 0, limit_gb above 0")


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run."""

    extractor: Any = field(default_factory=dict)
    """Mapping. With a `name`, the configuration of a new extractor; without, what to change of
    the given one without other weights, such as timesteps, taps and conditioning."""
    initial: Literal["random", "imagenet"] = "random"
    """Weights of a new extractor."""
    head: Any = field(default_factory=lambda: {"name": "fcn"})
    """Mapping: name in HEADS and its configuration."""
    trainable: Literal["none", "decoder", "all", "network"] = "none"
    """What is trained beside the head: nothing, the denoiser's decoder, all of the denoiser, or
    with it the networks before it (of another extractor, both: all of it)."""
    extractor_rate: float = 1.0
    """Learning rate of what is trained of the extractor, against that of the head."""
    mpp: float | None = None
    """Micrometres per pixel to train and predict at; null = those that the given extractor or
    model was made for, 0.5 for a new network."""
    window_px: int = 768
    """Side of a window at prediction."""
    resize_px: int | None = None
    """Stretch each labelled image to a square of this side instead of reading it at `mpp`, as the
    paper does with GlaS; measured at the image's own resolution all the same."""
    patch_tiles: tuple[int, int] = (1, 2)
    """Rows and columns of tiles in a training patch."""
    normalise: Literal["none", "macenko"] = "none"
    """Stain normalisation to the training images' median stain, applied at prediction too."""
    seed: int = 0
    """Seed of weights, patches and noise."""
    limit: int = 0
    """Labelled images to train on, drawn by the seed; 0 = all."""
    validation_share: float = 0.15
    """Share of the images, whole patients, that choose the best weights; 0 = keep the last."""
    validate_every: int = 0
    """Optimiser steps between two validations; 0 = an epoch."""
    patience: int = 0
    """Validations without a better Dice after which training ends; 0 = never."""
    cache_mb: int = 2048
    """Memory for images at the training resolution, and as much again for background images."""
    feature_cache: FeatureCacheConfig = FeatureCacheConfig()
    """Features kept on disk, for a frozen extractor."""
    border_um: float = 0.0
    """Width of the band inside the edge of every object that is learnt beside the classes, so that
    touching objects come apart; 0 = none. For data sets with instances."""
    objects: ObjectsConfig = ObjectsConfig()
    """Post-processing of the labels, which goes into the checkpoint."""
    temperature: float | None = None
    """What class logits are divided by; null = fitted on the validation images where there are
    some, else 1."""
    ema: float = 0.0
    """Moving average of the weights, which is what is validated and kept; 0 = the weights
    themselves."""
    background: BackgroundConfig = BackgroundConfig()
    """Glass, and images that show nothing but background."""
    allow_empty_classes: bool = False
    """Whether a class may have no pixel in the training images."""
    augment: AugmentConfig = AugmentConfig()
    """Variation of the patches."""
    loss: LossConfig = LossConfig()
    """Losses."""
    loop: LoopConfig = LoopConfig()
    """Optimisation."""
    licence: str = ""
    """Terms of the weights; empty = the data's and the extractor's, as far as they are known."""

    def __post_init__(self) -> None:
        if not isinstance(self.extractor, Mapping):
            raise ConfigError(
                f"extractor {self.extractor!r}: must be a mapping, such as extractor.name=cnn"
            )
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"validation_share {self.validation_share}: must be 0 to below 1")
        for name in ("validate_every", "patience", "limit", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)}: must not be negative")
        if min(self.patch_tiles) < 1 or self.cache_mb < 1:
            raise ConfigError("patch_tiles and cache_mb must be at least 1")
        if not 0 <= self.border_um < float("inf"):
            raise ConfigError(f"border_um {self.border_um}: must not be negative")
        negatives = self.background.sources or self.background.annotated
        if negatives and (self.normalise != "none" or self.resize_px is not None):
            raise ConfigError(
                "background: its images are neither normalised nor stretched; leave out "
                "normalise and resize_px"
            )
        if not 0 < self.extractor_rate < float("inf"):
            raise ConfigError(f"extractor_rate {self.extractor_rate}: must be above 0")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema {self.ema}: must be from 0 to below 1")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature}: must be above 0")
        if self.mpp is not None and not 0 < self.mpp < float("inf"):
            raise ConfigError(f"mpp {self.mpp}: must be above 0")
        if self.resize_px is not None and self.resize_px < 1:
            raise ConfigError(f"resize_px {self.resize_px}: must be above 0")
        if self.feature_cache.patches and self.trainable != "none":
            raise ConfigError("feature_cache: only for a frozen extractor (trainable: none)")
