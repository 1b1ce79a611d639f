"""The tables of extractors and heads, and the typed configuration of a model. Knows no files.

A new extractor or head is a file, a line in its table and a YAML; the contract tests run over the
tables.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from wsiseg.classes import Classes
from wsiseg.config import from_mapping, to_mapping
from wsiseg.errors import ConfigError
from wsiseg.models.base import FeatureExtractor, FeatureSpec, Head
from wsiseg.models.extractors.cnn import CNNConfig, CNNExtractor
from wsiseg.models.extractors.ddpm import DDPMConfig, DDPMExtractor
from wsiseg.models.extractors.genselfdiff import GenSelfDiffConfig, GenSelfDiffExtractor
from wsiseg.models.extractors.hipt import HIPTConfig, HIPTExtractor
from wsiseg.models.extractors.pathsegdiff import PathSegDiffConfig, PathSegDiffExtractor
from wsiseg.models.extractors.stain import StainConfig, StainExtractor
from wsiseg.models.heads.fcn import FCN, FCNConfig
from wsiseg.models.heads.fcn8 import FCN8Config, FCN8Head
from wsiseg.models.heads.linear import LinearConfig, LinearHead
from wsiseg.models.heads.pixel_mlp import PixelMLPConfig, PixelMLPHead
from wsiseg.models.heads.threshold import ThresholdConfig, ThresholdHead
from wsiseg.models.heads.unet import UNetHead, UNetHeadConfig
from wsiseg.models.limits import buildable, check_sizes, check_window
from wsiseg.models.segmenter import ModelInfo, Segmenter
from wsiseg.objects import ObjectsConfig
from wsiseg.stain import read_basis

MPP_RANGE = (0.02, 200.0)
"""Micrometres per pixel that a model can plausibly be made for."""


class ExtractorEntry(NamedTuple):
    """A line of EXTRACTORS.

    Attributes:
        config: the configuration's dataclass; it has a field `tile_px`.
        build: the extractor of such a configuration.
        options: keys that may be changed without other weights.
    """

    config: type[Any]
    build: Callable[[Any], FeatureExtractor]
    options: tuple[str, ...] = ()


class HeadEntry(NamedTuple):
    """A line of HEADS.

    Attributes:
        config: the configuration's dataclass.
        build: the head for an extractor, a number of classes and such a configuration.
    """

    config: type[Any]
    build: Callable[[FeatureExtractor, int, Any], Head]


def _on_tiles(head: Callable[..., Head]) -> Callable[[FeatureExtractor, int, Any], Head]:
    """The build of a head that asks for the extractor's maps and the side of its tiles."""
    return lambda e, count, config: head(e.specs, count, config, tile_px=e.tile_px)


def _threshold(extractor: FeatureExtractor, class_count: int, config: ThresholdConfig) -> Head:
    if [tuple(s) for s in extractor.specs] != [(1, 1)] or class_count != 2:
        raise ConfigError("head threshold: needs an extractor with one full-size map and 2 classes")
    return ThresholdHead(config)


def _on_specs(
    head: Callable[[Sequence[FeatureSpec], int, Any], Head],
) -> Callable[[FeatureExtractor, int, Any], Head]:
    """The build of a head that asks only for the extractor's maps."""
    return lambda extractor, class_count, config: head(extractor.specs, class_count, config)


EXTRACTORS: dict[str, ExtractorEntry] = {
    "pathsegdiff": ExtractorEntry(
        PathSegDiffConfig, PathSegDiffExtractor, ("timesteps", "taps", "details", "conditioning")
    ),
    "stain": ExtractorEntry(StainConfig, StainExtractor),
    "genselfdiff": ExtractorEntry(GenSelfDiffConfig, GenSelfDiffExtractor, ("timestep",)),
    "ddpm": ExtractorEntry(DDPMConfig, DDPMExtractor, ("timesteps", "taps", "shared_noise")),
    "cnn": ExtractorEntry(CNNConfig, CNNExtractor, ("tile_px",)),
    "hipt": ExtractorEntry(HIPTConfig, HIPTExtractor),
}

HEADS: dict[str, HeadEntry] = {
    "fcn": HeadEntry(FCNConfig, _on_tiles(FCN)),
    "threshold": HeadEntry(ThresholdConfig, _threshold),
    "pixel_mlp": HeadEntry(PixelMLPConfig, _on_tiles(PixelMLPHead)),
    "unet": HeadEntry(UNetHeadConfig, _on_specs(UNetHead)),
    "fcn8": HeadEntry(FCN8Config, _on_specs(FCN8Head)),
    "linear": HeadEntry(LinearConfig, _on_specs(LinearHead)),
}

CLASSES_ONLY = ("threshold", "pixel_mlp")
"""Heads whose outputs can only be classes."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides what a model computes, apart from its weights.

    `extractor` and `head` are mappings {name: a line of the table, ...the keys of its
    configuration}; they are checked and completed with the defaults when the object is made, so
    that `to_mapping` gives the resolved configuration and `from_mapping` takes it back.
    """

    extractor: Any
    """Mapping: name in EXTRACTORS and its configuration."""
    head: Any
    """Mapping: name in HEADS and its configuration."""
    classes: Any
    """Classes in network order, or their rows as of `Classes.to_list`."""
    mpp: float = 0.5
    """Micrometres per pixel of a window."""
    window_px: int = 768
    """Side of a window in pixels; a multiple of the extractor's tile."""
    input: Literal["rgb/127.5-1"] = "rgb/127.5-1"
    """How pixels become numbers: uint8 RGB / 127.5 - 1."""
    stain_target: Any = None
    """None, or StainBasis (or its mapping: vectors, maxima) that images are normalised to first."""
    resize_px: int | None = None
    """None, or the side of the square that labelled images are stretched to (slides never are)."""
    border: bool = False
    """Whether the network has one output more than classes: the border of objects."""
    temperature: float = 1.0
    """Class logits are divided by this before the softmax: what calibrates the probabilities."""
    objects: ObjectsConfig = ObjectsConfig()
    """Post-processing of the labels."""

    def __post_init__(self) -> None:
        classes = (
            self.classes if isinstance(self.classes, Classes) else Classes.from_list(self.classes)
        )
        extractor = resolve(self.extractor, EXTRACTORS, "extractor")
        resolved = {
            "extractor": extractor,
            "head": resolve(self.head, HEADS, "head"),
            "classes": classes.to_list(),
            "stain_target": to_mapping(read_basis(self.stain_target)),
        }
        for key, value in resolved.items():
            object.__setattr__(self, key, value)
        low, high = MPP_RANGE
        if not (math.isfinite(self.mpp) and low <= self.mpp <= high):
            raise ConfigError(f"mpp {self.mpp}: must be from {low} to {high} um per pixel")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature {self.temperature}: must be above 0")
        if self.border and self.head["name"] in CLASSES_ONLY:
            raise ConfigError(f"head {self.head['name']}: has no output for borders")
        check_window(self.window_px, extractor["tile_px"], self.resize_px)


def resolve(
    data: Any, table: Mapping[str, ExtractorEntry] | Mapping[str, HeadEntry], where: str
) -> dict[str, Any]:
    """The mapping {name, ...configuration} checked and completed with the defaults.

    Raises:
        ConfigError: no or unknown name, unknown keys, values that cannot be.
    """
    config = typed_config(data, table, where)
    return {"name": data["name"], **to_mapping(config)}


def typed_config(
    data: Any, table: Mapping[str, ExtractorEntry] | Mapping[str, HeadEntry], where: str
) -> Any:
    """The configuration object of a mapping {name, ...configuration}.

    Raises:
        ConfigError: as in `resolve`.
    """
    if not isinstance(data, Mapping) or "name" not in data:
        raise ConfigError(f"{where}: must be a mapping with a name, one of {', '.join(table)}")
    name = data["name"]
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"{where}.name: {name!r} is not one of {', '.join(table)}")
    rest = {k: v for k, v in data.items() if k != "name"}
    check_sizes(rest, where)
    return from_mapping(table[name].config, rest, where)


def extractor_mapping(extractor: FeatureExtractor) -> dict[str, Any]:
    """The resolved {name, ...configuration} of an extractor that was built from the table."""
    config = getattr(extractor, "config", None)
    for name, entry in EXTRACTORS.items():
        if type(config) is entry.config:
            return {"name": name, **to_mapping(config)}
    raise ConfigError(f"{type(extractor).__name__} is not an extractor of the table")


def with_options(config: Mapping[str, Any], options: Mapping[str, Any] | None) -> dict[str, Any]:
    """An extractor's mapping with some keys changed, of those that need no other weights.

    Raises:
        ConfigError: another key.
    """
    allowed = EXTRACTORS[config["name"]].options
    for key in options or {}:
        if key not in allowed:
            raise ConfigError(
                f"extractor.{key}: cannot be changed without other weights; these can: "
                f"{', '.join(allowed) or 'none'}"
            )
    return {**config, **(options or {})}


@buildable("extractor")
def build_extractor(data: Mapping[str, Any]) -> FeatureExtractor:
    """The extractor of a mapping {name, ...configuration}, with random weights.

    Raises:
        ConfigError: as in `resolve`.
    """
    config = typed_config(data, EXTRACTORS, "extractor")
    return EXTRACTORS[data["name"]].build(config)


def extractor_skeleton(config: Any, *, whole: bool = True) -> FeatureExtractor:
    """An extractor whose tensors have shapes but no memory (the meta device).

    Args:
        config: mapping {name, ...configuration}.
        whole: with what only training needs (the first stage's decoder); a segmenter's file is
            without.

    Raises:
        ConfigError: as in `resolve`.
    """
    with torch.device("meta"):
        extractor = build_extractor(config)
    drop = getattr(extractor, "drop_decoder", None)
    if drop is not None and not whole:
        drop()
    return extractor


@buildable("model")
def build_segmenter(
    config: ModelConfig,
    *,
    extractor: FeatureExtractor | None = None,
    info: Mapping[str, Any] | None = None,
) -> Segmenter:
    """The segmenter of a configuration.

    Args:
        config: the model.
        extractor: one to use instead of a new one with random weights; its configuration must be
            that of `config`.
        info: fields of ModelInfo that the configuration does not hold: name, sha256, licence, card.

    Raises:
        ConfigError: head, extractor and classes that do not fit one another.
    """
    if extractor is None:
        extractor = build_extractor(config.extractor)
    elif extractor_mapping(extractor) != config.extractor:
        raise ConfigError("the extractor given is not of the model's configuration")
    classes = Classes.from_list(config.classes)
    head_config = typed_config(config.head, HEADS, "head")
    head = HEADS[config.head["name"]].build(
        extractor, len(classes) + int(config.border), head_config
    )
    resolved = to_mapping(config)
    later = {"border": False, "temperature": 1.0, "objects": to_mapping(ObjectsConfig())}
    digested = {k: v for k, v in resolved.items() if v is not None and v != later.get(k)}
    known = {
        "name": config.extractor["name"],
        "sha256": hashlib.sha256(json.dumps(digested, sort_keys=True).encode()).hexdigest(),
        **(info or {}),
    }
    described = ModelInfo(
        **known,
        classes=classes,
        mpp=config.mpp,
        window_px=config.window_px,
        tile_px=extractor.tile_px,
        config=resolved,
        stain_target=read_basis(config.stain_target),
        resize_px=config.resize_px,
        border=config.border,
        temperature=config.temperature,
        objects=config.objects,
    )
    return Segmenter(extractor, head, described)
