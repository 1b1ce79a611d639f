"""Segmenters and extractors to files and back, by name or path. Knows no training, no slides.

A checkpoint is one safetensors file (see storage.py) whose metadata is

    format, kind         version of the layout; "segmenter" or "extractor"
    config               the resolved ModelConfig; of an extractor alone: {"extractor": {...}}
    extractor_fingerprint  digest of the extractor's configuration and tensors, checked at load
    licence, card        terms of the weights; provenance: data, training, metrics
    versions             of what wrote it

Tensors are named `extractor.*` and `head.*`. What only training needs of an extractor (the
decoder of a first stage) is left out of a segmenter's file.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsiseg import __version__
from wsiseg.config import from_mapping
from wsiseg.errors import CheckpointError, ConfigError, UsageError
from wsiseg.models import storage, zoo
from wsiseg.models.base import FeatureExtractor
from wsiseg.models.devices import pick_device
from wsiseg.models.fill import fill
from wsiseg.models.registry import (
    EXTRACTORS,
    HEADS,
    ModelConfig,
    build_extractor,
    build_segmenter,
    extractor_mapping,
    extractor_skeleton,
    resolve,
    with_options,
)
from wsiseg.models.segmenter import Segmenter

__all__ = [
    "EXTRACTORS",
    "HEADS",
    "ModelConfig",
    "build_extractor",
    "build_segmenter",
    "extractor_mapping",
    "file_name",
    "load_extractor",
    "load_model",
    "read_card",
    "save_checkpoint",
    "save_extractor",
]


def save_checkpoint(
    path: str | Path,
    segmenter: Segmenter,
    *,
    card: Mapping[str, Any],
    licence: str,
    dtype: storage.Precision = "float32",
) -> None:
    """Write a segmenter for prediction; the segmenter itself is left as it is.

    Args:
        path: a name that ends in .safetensors.
        segmenter: one of `build_segmenter` or `load_model`.
        card: provenance as plain data.
        licence: terms of the weights, an SPDX name or a sentence.
        dtype: float16 halves the file: matrices and kernels are rounded, vectors stay float32.

    Raises:
        UsageError: another suffix.
        CheckpointError: weights that are not finite, or not in the range of float16.
        OutputError: the file cannot be written.
    """
    config = dict(segmenter.info.config)
    wanted = _skeleton_shapes(extractor_skeleton(config["extractor"], whole=False))
    state = segmenter.extractor.state_dict()
    tensors = storage.pack({n: state[n] for n in wanted}, "extractor.", dtype)
    tensors |= storage.pack(segmenter.head.state_dict(), "head.", dtype)
    _write(path, "segmenter", config, tensors, {"card": dict(card), "licence": licence})


def save_extractor(
    path: str | Path,
    extractor: FeatureExtractor,
    *,
    card: Mapping[str, Any],
    licence: str,
    dtype: storage.Precision = "float32",
) -> None:
    """Write a whole extractor, the first stage's decoder included, to train heads on.

    Arguments and errors are those of `save_checkpoint`.
    """
    config = {"extractor": extractor_mapping(extractor)}
    tensors = storage.pack(extractor.state_dict(), "extractor.", dtype)
    _write(path, "extractor", config, tensors, {"card": dict(card), "licence": licence})


def _write(
    path: str | Path,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
) -> None:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: the name of a checkpoint must end in .safetensors")
    metadata = {
        "kind": kind,
        "config": config,
        "extractor_fingerprint": _fingerprint(config["extractor"], tensors),
        "versions": {
            "wsiseg": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        **about,
    }
    storage.write(path, tensors, metadata)


def _fingerprint(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    own = {n: t for n, t in tensors.items() if n.startswith("extractor.")}
    return storage.fingerprint(config, own)


def read_card(path: str | Path) -> dict[str, Any]:
    """The metadata of a checkpoint (see the module), without reading its tensors.

    Raises:
        CheckpointError: as `load_model`, for what can be seen without the tensors.
    """
    path = Path(path)
    metadata, _ = storage.read_header(path)
    _typed_config(path, metadata)
    return metadata


def load_model(name_or_path: str | Path, *, device: str = "auto") -> Segmenter:
    """A segmenter ready to predict: evaluation mode, float32, on the device.

    Args:
        name_or_path: a name that `wsiseg models list` shows, or a .safetensors file.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        CheckpointError: no such model or file, or a file that is not what was expected.
        UsageError: a device that is not there.
    """
    target = pick_device(device)
    entry, path = zoo.find(name_or_path)
    if path is None:
        assert entry is not None
        assert entry.config is not None
        info = {"name": entry.name, "licence": entry.licence, "card": {"summary": entry.summary}}
        return _ready(build_segmenter(entry.config, info=info), target)
    metadata, shapes = storage.read_header(path)
    config = _typed_config(path, metadata)
    if not isinstance(config, ModelConfig):
        raise CheckpointError(
            f"{path}: an extractor without a head; train one on labelled images with 'wsiseg train'"
        )
    for key, value in _named_options(entry).items():
        if config.extractor[key] != value:
            raise CheckpointError(f"{path}: {key} is not {value}, as {name_or_path} has it")
    info = {
        "name": entry.name if entry else file_name(path),
        "sha256": storage.sha256_of(path),
        "licence": metadata["licence"],
        "card": metadata["card"],
    }
    try:
        extractor = extractor_skeleton(config.extractor, whole=False)
        with torch.device("meta"):
            segmenter = build_segmenter(config, extractor=extractor, info=info)
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e}") from e
    fill(path, segmenter, _checked_tensors(path, metadata, shapes, _skeleton_shapes(segmenter)))
    return _ready(segmenter, target)


def load_extractor(
    name_or_path: str | Path,
    *,
    device: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> FeatureExtractor:
    """The extractor of a checkpoint of either kind, frozen, in evaluation mode.

    Args:
        name_or_path: as for `load_model`.
        device: as for `load_model`.
        options: keys of the extractor's configuration to change, of those that need no other
            weights (EXTRACTORS[name].options: timesteps, taps, conditioning).

    Raises:
        CheckpointError, ModelError, UsageError: as for `load_model`.
        ConfigError: options that cannot be.
    """
    target = pick_device(device)
    entry, path = zoo.find(name_or_path)
    if path is None:
        assert entry is not None
        assert entry.config is not None
        extractor = build_extractor(with_options(entry.config.extractor, options))
    else:
        metadata, shapes = storage.read_header(path)
        config = _typed_config(path, metadata)
        whole = not isinstance(config, ModelConfig)
        stored = config["extractor"] if isinstance(config, dict) else config.extractor
        changes = {**_named_options(entry), **(options or {})}
        extractor = extractor_skeleton(with_options(stored, changes), whole=whole)
        expected = {f"extractor.{n}": s for n, s in _skeleton_shapes(extractor).items()}
        own = {n: s for n, s in shapes.items() if n.startswith("extractor.")}
        tensors = _checked_tensors(path, metadata, own, expected)
        fill(path, extractor, {n.removeprefix("extractor."): tensors[n] for n in expected})
    extractor.requires_grad_(False)
    return extractor.eval().to(target)


def file_name(path: Path) -> str:
    """What to call a model by its file; that of a training run is called by its folder."""
    return path.stem if path.stem != "model" else path.resolve().parent.name


def _named_options(entry: zoo.ZooEntry | None) -> dict[str, Any]:
    """What a name asks of the file that it shares with another name."""
    if entry is None or not entry.shares or entry.extractor is None:
        return {}
    allowed = EXTRACTORS[entry.extractor["name"]].options
    return {key: value for key, value in entry.extractor.items() if key in allowed}


def _ready(segmenter: Segmenter, device: torch.device) -> Segmenter:
    segmenter.requires_grad_(False)
    return segmenter.eval().to(device)


def _typed_config(path: Path, metadata: Mapping[str, Any]) -> ModelConfig | dict[str, Any]:
    """ModelConfig of a segmenter's file, {"extractor": resolved} of an extractor's."""
    config, licence, card = (metadata.get(k) for k in ("config", "licence", "card"))
    if not (isinstance(config, dict) and isinstance(licence, str) and isinstance(card, dict)):
        raise CheckpointError(f"{path}: metadata without config, licence or card; fetch it again")
    try:
        if metadata["kind"] == "segmenter":
            return from_mapping(ModelConfig, config)
        return {"extractor": resolve(config.get("extractor"), EXTRACTORS, "extractor")}
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e}") from e


def _skeleton_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _checked_tensors(
    path: Path,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """The file's tensors, after checking names and shapes, and then the fingerprint."""
    for name, shape in expected.items():
        if name not in shapes:
            raise CheckpointError(f"{path}: tensor {name} is missing; the file is not whole")
        if shapes[name] != shape:
            found, wanted = list(shapes[name]), list(shape)
            raise CheckpointError(
                f"{path}: tensor {name} is {found} where the configuration needs {wanted}"
            )
    for name in shapes:
        if name not in expected:
            raise CheckpointError(f"{path}: tensor {name} does not belong to its configuration")
    tensors = storage.read_tensors(path)
    if metadata.get("extractor_fingerprint") != _fingerprint(
        metadata["config"]["extractor"], tensors
    ):
        raise CheckpointError(
            f"{path}: the extractor is not the one that the head was made for; fetch it again"
        )
    return tensors
