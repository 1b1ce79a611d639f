"""What a training run starts from: a given extractor or model, or a new network.

Knows the configuration and checkpoints, no data.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from wsiseg.errors import CheckpointError, ConfigError, ModelError, UsageError
from wsiseg.models.base import FeatureExtractor
from wsiseg.models.checkpoint import file_name, load_extractor, load_model, read_card
from wsiseg.models.devices import pick_device
from wsiseg.models.extractors.hipt import from_pathsegdiff
from wsiseg.models.extractors.pathsegdiff import PathSegDiffExtractor
from wsiseg.models.registry import (
    EXTRACTORS,
    build_extractor,
    extractor_mapping,
    resolve,
    with_options,
)
from wsiseg.models.segmenter import Segmenter
from wsiseg.models.storage import sha256_of
from wsiseg.models.zoo import find
from wsiseg.training.ancestors import kept_of
from wsiseg.training.train_config import TrainConfig

DEFAULT = "pathsegdiff-brca"
"""The extractor of a run that names none: the paper's."""
DEFAULT_MPP = 0.5
"""Micrometres per pixel where nothing says another: 20x."""
CLOSE = 1.1
"""Ratio of resolutions up to which features are taken to be at home."""


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
        model: the extractor, or the model whose head is gone on with.
        config: the run's configuration with its resolution.
        origin: what the card says of where the weights come from.
    """

    model: FeatureExtractor | Segmenter
    config: TrainConfig
    origin: dict[str, Any]


def starting_point(
    config: TrainConfig, given: str | None, *, with_head: bool = False, device: str = "auto"
) -> Start:
    """What to train.

    Where the run's resolution is far from that of the given extractor there is a warning.

    Args:
        config: the run's configuration; its extractor has a name for a new network.
        given: a file of `wsiseg pretrain` or `wsiseg models import`, a checkpoint or a model's
            name; None for a new network, or for the paper's extractor where none is configured.
        with_head: go on with the head of the given model.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UsageError: a frozen network with random weights; a head to go on with and no model; a
            device that is not there.
        ConfigError: an extractor that is not the one of the file.
        CheckpointError, ModelError: the file cannot be used.
    """
    named = "name" in config.extractor
    chosen = given is not None
    if given is None and (with_head or not named):
        given = DEFAULT
        if with_head:
            raise UsageError("--with-head: give the model with --extractor")
    if given is None:
        mpp = config.mpp or DEFAULT_MPP
        model, initial = _new(config, device)
        return Start(model, replace(config, mpp=mpp), {"initial": initial})
    if with_head:
        start: FeatureExtractor | Segmenter = _with_head(config, given, device)
    elif named:
        start = _as_named(config.extractor, given, device)
    else:
        try:
            start = load_extractor(given, device=device, options=config.extractor)
        except CheckpointError as e:
            if chosen:
                raise
            raise type(e)(
                f"no --extractor was given: {e}; or give another, such as glas-small"
            ) from e
    origin, own = _origin(given, with_head=with_head)
    mpp = config.mpp or own or DEFAULT_MPP
    if own and config.resize_px is None and max(mpp / own, own / mpp) > CLOSE:
        warnings.warn(
            f"mpp {mpp:g}: the extractor was made for {own:g} um per pixel; its features may mean "
            "little at another resolution",
            stacklevel=2,
        )
    return Start(start, replace(config, mpp=mpp), origin)


def _origin(given: str, *, with_head: bool) -> tuple[dict[str, Any], float | None]:
    """What the card says of a file, and the resolution it was made for, if it tells."""
    entry, file = find(given)
    if file is None:
        return {}, None
    card = read_card(file)
    kept, *older = kept_of({**card["card"], "licence": card["licence"]}, with_head=with_head)
    kept |= {"name": entry.name if entry else file_name(file), "sha256": sha256_of(file)}
    about = {"extractor": kept, "ancestors": older}
    own = card["config"].get("mpp") or card["card"].get("pretraining", {}).get("mpp")
    return about, own or (DEFAULT_MPP if entry else None)


def _new(config: TrainConfig, device: str) -> tuple[FeatureExtractor, str]:
    """A new network and what its weights are: random ones where ImageNet's cannot be had."""
    torch.manual_seed(config.seed)
    extractor, initial = build_extractor(config.extractor), str(config.initial)
    if config.initial == "imagenet":
        try:
            extractor.load_imagenet()
        except ModelError as e:
            if config.trainable == "none":
                raise
            warnings.warn(f"{e}; training begins with random weights", stacklevel=3)
            initial = "random, as ImageNet weights could not be had"
    elif config.trainable == "none" and any(True for _ in extractor.parameters()):
        raise UsageError(
            f"extractor {config.extractor['name']}: its weights are random and would stay so; "
            "give --extractor FILE, or set trainable: all or initial: imagenet"
        )
    return extractor.eval().to(pick_device(device)), initial


def _with_head(config: TrainConfig, given: str, device: str) -> Segmenter:
    """The given model as it is; a configuration that asks for another extractor is refused."""
    model = load_model(given, device=device)
    changed = _changes(config.extractor, extractor_mapping(model.extractor), given)
    if changed:
        raise ConfigError(
            f"extractor.{next(iter(changed))}: with --with-head the extractor stays that of {given}"
            "; leave it out, or --with-head"
        )
    return model


def _as_named(config: Mapping[str, Any], given: str, device: str) -> FeatureExtractor:
    """The given extractor, which must be of the configuration but for its options.

    HIPT is the encoder of a PathSegDiff file, too.
    """
    loaded = load_extractor(given, device=device)
    if config["name"] == "hipt" and isinstance(loaded, PathSegDiffExtractor):
        loaded = from_pathsegdiff(loaded)
    own = extractor_mapping(loaded)
    changed = _changes(config, own, given)
    with_options(own, changed)  # refuses what needs other weights
    return load_extractor(given, device=device, options=changed) if changed else loaded


def _changes(config: Mapping[str, Any], own: Mapping[str, Any], given: str) -> dict[str, Any]:
    """What a configuration asks for that the extractor of a file, `own`, is not.

    Raises:
        ConfigError: another extractor altogether.
    """
    if config.get("name", own["name"]) != own["name"]:
        raise ConfigError(f"{given}: holds the extractor {own['name']}, not {config['name']}")
    wanted = resolve(_over(own, config), EXTRACTORS, "extractor")
    return {key: value for key, value in wanted.items() if value != own[key]}


def _over(own: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """`own` with what is asked for, key by key: what a part leaves out, such as the scale of the
    latents that pretraining measured, stays."""
    parts = {k: v for k, v in asked.items() if isinstance(v, Mapping)}
    there = {k: v for k, v in parts.items() if isinstance(own.get(k), Mapping)}
    return {**own, **asked, **{k: _over(own[k], v) for k, v in there.items()}}


def licence_of(config: TrainConfig, terms: Iterable[str], origin: Mapping[str, Any]) -> str:
    """The terms of the weights: the configuration's, else the data's and the extractor's."""
    return config.licence or joined((*terms, origin.get("extractor", {}).get("licence", "")))


def joined(licences: Iterable[str]) -> str:
    """Several terms as one sentence, each once."""
    every = dict.fromkeys("; ".join(licences).split("; "))
    return "; ".join(t for t in every if t and t != "unknown") or "unknown"
