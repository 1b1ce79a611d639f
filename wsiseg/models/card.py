"""Statements on a checkpoint's card: use, data, terms, limits, metrics. Changes no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsiseg.models.checkpoint import load_model, save_checkpoint


def add_to_card(path: str | Path, statements: Mapping[str, Any], *, out: str | Path) -> None:
    """Write a segmenter's checkpoint again, as float16, with more on its card.

    Args:
        path: a checkpoint of `wsiseg train`.
        statements: plain data by title; a title that is there already is replaced.
        out: the file to write, which may be `path`.

    Raises:
        CheckpointError, UsageError, OutputError: as for `load_model` and `save_checkpoint`.
    """
    segmenter = load_model(path, device="cpu")
    card = {**segmenter.info.card, **statements}
    licence = segmenter.info.licence
    save_checkpoint(out, segmenter, card=card, licence=licence, dtype="float16")
