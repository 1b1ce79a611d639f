"""What a model is, as plain data: parts, parameters, feature maps, terms. Reads no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wsiseg.config import from_mapping, to_mapping
from wsiseg.errors import CheckpointError, ConfigError
from wsiseg.models import zoo
from wsiseg.models.base import FeatureExtractor
from wsiseg.models.checkpoint import read_card
from wsiseg.models.extractors.pathsegdiff import PathSegDiffExtractor, parameter_counts
from wsiseg.models.registry import (
    EXTRACTORS,
    ModelConfig,
    build_segmenter,
    extractor_skeleton,
    resolve,
)


def list_models() -> list[dict[str, Any]]:
    """One row a name of the zoo: name, state, summary, licence; classes and mpp where known."""
    rows = []
    for entry in zoo.MODELS.values():
        row: dict[str, Any] = {
            "name": entry.name,
            "state": _state(entry),
            "summary": entry.summary,
            "licence": entry.licence,
        }
        config = to_mapping(entry.config) if entry.config else None
        if entry.path is not None and entry.available:
            config = read_card(entry.path)["config"]
        if config and "classes" in config:
            row["classes"] = [c["name"] for c in config["classes"]]
            row["mpp"] = config["mpp"]
        rows.append(row)
    return rows


def describe(name_or_path: str | Path, *, class_count: int = 6) -> dict[str, Any]:
    """A model of the zoo or a checkpoint file.

    The architecture is built without memory, so that counts are those of the real modules.

    Args:
        name_or_path: a name of the zoo or a .safetensors file.
        class_count: classes of the head, for an architecture without trained head.

    Returns:
        name, summary, state, licence, the parameter count of each part under the part's name
        (pathsegdiff: hipt, unet, first_stage, conditioner, fcn), parts, total, config, features
        (one row a map), sources or card. Of a trained model the counts are those of its file,
        which is without the first stage's decoder. Of an extractor's file a window is a tile, at
        the mpp that it was pretrained at, None where the card does not say it.

    Raises:
        CheckpointError: no such model or file, or a file that is not what was expected.
    """
    entry = zoo.MODELS.get(str(name_or_path))
    about: dict[str, Any] = {"name": entry.name if entry else str(name_or_path)}
    path: Path | None = None
    config: Mapping[str, Any] = {}
    if entry:
        about |= {"summary": entry.summary, "state": _state(entry), "licence": entry.licence}
        config = to_mapping(entry.config) if entry.config else {"extractor": entry.extractor}
        path = entry.path if entry.available else None
    if entry is None or entry.weights == "bundled":
        path = zoo.find(name_or_path)[1]
    if path is not None:
        metadata = read_card(path)
        config = metadata["config"]
        about |= {k: metadata[k] for k in ("kind", "licence", "card", "versions") if k in metadata}
        about["extractor_fingerprint"] = metadata.get("extractor_fingerprint")
        if entry and entry.extractor:
            config = {**config, "extractor": {**config["extractor"], **entry.extractor}}
    alone = entry is None and "classes" not in config  # an extractor's file: nothing says a window
    if alone:
        tile = resolve(config["extractor"], EXTRACTORS, "extractor")["tile_px"]
        config = {**config, "window_px": tile}
    about |= _architecture(config, class_count) | _sources(entry)
    if alone:
        about["config"]["mpp"] = about["card"].get("pretraining", {}).get("mpp")
    return about


def _architecture(config: Mapping[str, Any], class_count: int) -> dict[str, Any]:
    trained = "classes" in config
    names = [{"name": f"class {i + 1}", "color": [0, 0, 0]} for i in range(class_count)]
    try:
        model = from_mapping(ModelConfig, {"head": {"name": "fcn"}, "classes": names, **config})
        extractor = extractor_skeleton(model.extractor, whole=not trained)
        with torch.device("meta"):
            segmenter = build_segmenter(model, extractor=extractor)
    except ConfigError as e:
        raise CheckpointError(f"the model cannot be built: {e}") from e
    parts = _counts(segmenter.extractor, model.extractor["name"])
    name = model.head["name"]  # a denoiser's part may be called unet, too
    parts[f"{name}_head" if name in parts else name] = sum(
        p.numel() for p in segmenter.head.parameters()
    )
    resolved = to_mapping(model)
    if not trained:
        resolved.pop("classes")
    return {
        **parts,
        "total": sum(parts.values()),
        "parts": list(parts),
        "class_count": len(model.classes),
        "trained_head": trained,
        "config": resolved,
        "features": feature_table(segmenter.extractor),
    }


def feature_table(extractor: FeatureExtractor) -> list[dict[str, Any]]:
    """One row a feature map: tap, block, timestep, channels, stride in pixels, side of a map."""
    rows: list[dict[str, Any]] = []
    blocks: list[tuple[int, str, int | None]] = [
        (i, "map", None) for i in range(len(extractor.specs))
    ]
    if isinstance(extractor, PathSegDiffExtractor):
        blocks = [
            (tap, f"decoder {tap - 1}" if tap else "middle", t)
            for t in extractor.config.timesteps
            for tap in extractor.config.taps
        ]
        first = len(blocks)
        blocks += [(first + k, "first stage", None) for k in range(len(extractor.config.details))]
    for (tap, block, timestep), spec in zip(blocks, extractor.specs, strict=True):
        rows.append(
            {
                "tap": tap,
                "block": block,
                "timestep": timestep,
                "channels": spec.channels,
                "stride": spec.stride,
                "side": extractor.tile_px // spec.stride,
            }
        )
    return rows


def _counts(extractor: FeatureExtractor, name: str) -> dict[str, int]:
    if isinstance(extractor, PathSegDiffExtractor):
        return parameter_counts(extractor)
    return {name: sum(p.numel() for p in extractor.parameters())}


def _state(entry: zoo.ZooEntry) -> str:
    if entry.available:
        return "needs no weights" if entry.path is None else "ready"
    return "not in this installation" if entry.weights == "bundled" else "weights not imported"


def _sources(entry: zoo.ZooEntry | None) -> dict[str, Any]:
    return {"sources": dict(entry.sources)} if entry and entry.sources else {}
