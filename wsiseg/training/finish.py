"""The end of a training run: the checkpoints of the last and the best weights, calibrated, drawn.

Knows no optimiser.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from wsiseg import __version__
from wsiseg.config import to_mapping
from wsiseg.models.checkpoint import save_checkpoint
from wsiseg.models.segmenter import Segmenter
from wsiseg.models.storage import as_text
from wsiseg.training.ancestors import (
    BACKGROUND,
    CONTENTS,
    GROUPS,
    HELD,
    IMAGES,
    chain,
    without_repeats,
)
from wsiseg.training.background import Background
from wsiseg.training.calibration import Pixels, checked_temperature, sampled_pixels
from wsiseg.training.evaluate import Measuring, predict_item
from wsiseg.training.files import read_state
from wsiseg.training.findings import found_labels
from wsiseg.training.head_task import HeadTask
from wsiseg.training.inputs import Inputs
from wsiseg.training.panels import panel_file, write_panel
from wsiseg.training.start import licence_of
from wsiseg.training.train_config import TrainConfig

PANELS = 4
"""Validation images drawn into the run folder."""
MOST_NAMES = 20_000
"""Images that a card names at most, with a checksum of 8 digits each."""
MOST_CHARACTERS = 700_000
"""Characters that names of images, or of groups, take on a card at most."""


def card_of(
    path: Path,
    config: TrainConfig,
    inputs: Inputs,
    background: Background | None,
    provenance: Mapping[str, Any],
) -> tuple[dict[str, Any], str]:
    """The card of a run's models, but for their validation, and their licence.

    Args:
        path: the checkpoint.
        config: the run's configuration.
        inputs: as they were read.
        background: the images beside them, if there are any.
        provenance: what the card says of data and extractor.

    Raises:
        OutputError: a card that could not be read back.
    """
    terms = [inputs.dataset.terms, *([] if background is None else background.terms)]
    names, groups = inputs.dataset.names, inputs.dataset.groups
    held = {groups[i] for i in inputs.validation}
    card = {
        "training": to_mapping(config),
        "images": {"training": len(inputs.training), "validation": len(inputs.validation)},
        IMAGES: _short(names[i] for i in (*inputs.training, *inputs.validation)),
        GROUPS: _short(sorted({groups[i] for i in inputs.training} | held)),
        HELD: _short(sorted(held)),
        CONTENTS: list(inputs.contents.images[:MOST_NAMES]),
        BACKGROUND: [] if background is None else background.contents[:MOST_NAMES],
        "wsiseg": __version__,
        **provenance,
    }
    if starts := chain(provenance)[1:]:
        kept, *older = without_repeats(card, starts)
        card |= {"extractor": kept, "ancestors": older}
    card = {k: v for k, v in card.items() if v or k not in (HELD, BACKGROUND, "ancestors")}
    licence = licence_of(config, terms, provenance)
    as_text(path, {"card": card, "licence": licence})
    return card, licence


def _short(names: Iterable[str]) -> list[str]:
    """The first names, as many as a card has room for."""
    first = list(islice(names, MOST_NAMES))
    ends = accumulate(len(json.dumps(name)) + 2 for name in first)
    return first[: sum(end <= MOST_CHARACTERS for end in ends)]


def write_models(path: Path, task: HeadTask, card: Mapping[str, Any], licence: str) -> None:
    """Write last.safetensors with the last weights, then `path` and the panels with the best.

    Args:
        path: the checkpoint; the run folder is the folder it is in.
        task: at the end of its training.
        card: of `card_of`.
        licence: the terms of the weights.

    Raises:
        OutputError: the run folder cannot be written.
        CheckpointError: best.pt, which training has left there, cannot be read.
    """
    config, segmenter, out = task.config, task.kept, path.parent
    inputs = task.inputs
    last = {**card, "validation": None}
    save_checkpoint(
        out / "last.safetensors", segmenter.eval(), card=last, licence=licence, dtype="float16"
    )
    task.module.load_state_dict(read_state(out / "best.pt", "last.safetensors is whole"))
    if config.temperature is None and inputs.validation:
        calibrate(segmenter, inputs)
    measured = task.validate().summary() if inputs.validation else None
    card = {**card, "validation": measured}
    save_checkpoint(path, segmenter.eval(), card=card, licence=licence, dtype="float16")
    for index in (inputs.validation or inputs.training)[:PANELS]:
        item = inputs.dataset[index]
        prediction = predict_item(segmenter, inputs.dataset, item, Measuring())
        predicted = found_labels(prediction, segmenter.info, mpp=inputs.dataset.mpp)
        write_panel(
            out / "validation" / panel_file(item.name),
            item.image,
            item.mask,
            predicted,
            inputs.dataset.classes,
            uncertainty=prediction.uncertainty,
        )


def calibrate(segmenter: Segmenter, inputs: Inputs) -> None:
    """Fit the temperature on the validation images; before, it is 1."""
    groups: dict[str, list[Pixels]] = {}
    for index in inputs.validation:
        item = inputs.dataset[index]
        maps = predict_item(segmenter, inputs.dataset, item, Measuring()).probabilities
        pixels = sampled_pixels(maps, item.mask, seed=index)
        groups.setdefault(inputs.dataset.groups[index], []).append(pixels)
    found = round(checked_temperature(groups), 4)
    config = {**segmenter.info.config, "temperature": found}
    segmenter.info = replace(segmenter.info, temperature=found, config=config)
