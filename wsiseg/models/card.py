"""What may be changed of a checkpoint without training: its card, what follows, the rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsiseg.config import apply_overrides, from_mapping, to_mapping
from wsiseg.errors import UsageError
from wsiseg.models.checkpoint import load_model, save_checkpoint
from wsiseg.models.folding import round_weights
from wsiseg.models.registry import ModelConfig

AFTER_WEIGHTS = ("objects", "temperature")
"""Keys of a model's configuration that no weight depends on."""
MEASURED = ("metrics", "validation")
"""What a card tells of a model as it was measured."""


def add_to_card(
    path: str | Path,
    statements: Mapping[str, Any],
    *,
    out: str | Path,
    settings: Sequence[str] = (),
    rounded: bool = False,
) -> None:
    """Write a segmenter's checkpoint again, as float16, with more on its card.

    Args:
        path: a checkpoint of `wsiseg train`.
        statements: plain data by title; a title that is there already is replaced. `licence`, the
            terms of the weights, is no title: it stands beside the card.
        out: the file to write, which may be `path`.
        settings: KEY=VALUE of the post-processing and the calibration (`AFTER_WEIGHTS`), such as
            objects.min_area_um2=400; numbers on the card that were measured before are left out.
        rounded: whether weights are rounded for half precision, see `round_weights`; numbers that
            were measured before are left out then, too.

    Raises:
        UsageError, ConfigError: another key; a value that cannot be; a licence that is no text.
        CheckpointError, UsageError, OutputError: as for `load_model` and `save_checkpoint`.
    """
    segmenter = load_model(path, device="cpu")
    for setting in settings:
        if setting.partition("=")[0].partition(".")[0] not in AFTER_WEIGHTS:
            raise UsageError(
                f"--set {setting}: only {' and '.join(AFTER_WEIGHTS)} can be set without training"
            )
    config = from_mapping(ModelConfig, apply_overrides(dict(segmenter.info.config), settings))
    segmenter.info = replace(
        segmenter.info,
        config=to_mapping(config),
        objects=config.objects,
        temperature=config.temperature,
    )
    kept = dict(segmenter.info.card)
    if settings or rounded:
        for measured in MEASURED:  # with other settings or weights
            kept.pop(measured, None)
    if rounded:
        round_weights(segmenter)
        kept["rounded"] = "bfloat16"
    card = {**kept, **statements}
    licence = card.pop("licence", segmenter.info.licence)
    if not isinstance(licence, str) or (not licence and "licence" in statements):
        raise UsageError("licence: give the terms of the weights in words, a line of text")
    save_checkpoint(out, segmenter, card=card, licence=licence, dtype="float16")
