"""The end of a training run: the checkpoints of the last and the best weights, calibrated, drawn.

Knows no optimiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsiseg import __version__
from wsiseg.config import to_mapping
from wsiseg.models.checkpoint import save_checkpoint
from wsiseg.models.segmenter import Segmenter
from wsiseg.training.calibration import Pixels, checked_temperature, sampled_pixels
from wsiseg.training.evaluate import Measuring, predict_item
from wsiseg.training.files import read_state
from wsiseg.training.findings import found_labels
from wsiseg.training.head_task import HeadTask
from wsiseg.training.inputs import Inputs
from wsiseg.training.panels import panel_file, write_panel
from wsiseg.training.start import licence_of

PANELS = 4
"""Validation images drawn into the run folder."""
MOST_NAMES = 20_000
"""Images that a card names at most, with a checksum of 8 digits each."""


def write_models(path: Path, task: HeadTask, provenance: Mapping[str, Any]) -> None:
    """Write last.safetensors with the last weights, then `path` and the panels with the best.

    Args:
        path: the checkpoint; the run folder is the folder it is in.
        task: at the end of its training.
        provenance: what the card says of data and extractor.

    Raises:
        OutputError: the run folder cannot be written.
        CheckpointError: best.pt, which training has left there, cannot be read.
    """
    config, segmenter, out = task.config, task.kept, path.parent
    inputs, licence = task.inputs, licence_of(task.config, task.dataset.terms, provenance)
    sizes = {"training": len(inputs.training), "validation": len(inputs.validation)}
    used = (*inputs.training, *inputs.validation)
    names = [inputs.dataset.names[i] for i in used]
    groups = sorted({inputs.dataset.groups[i] for i in used})
    card = {
        "training": to_mapping(config),
        "images": sizes,
        "training_images": names[:MOST_NAMES],
        "training_groups": groups[:MOST_NAMES],
        "training_contents": list(inputs.contents.images[:MOST_NAMES]),
        "wsiseg": __version__,
        **provenance,
    }
    last = {**card, "validation": None}
    save_checkpoint(
        out / "last.safetensors", segmenter.eval(), card=last, licence=licence, dtype="float16"
    )
    task.module.load_state_dict(read_state(out / "best.pt", "last.safetensors is whole"))
    if config.temperature is None and inputs.validation:
        calibrate(segmenter, inputs)
    measured = task.validate().summary() if inputs.validation else None
    card["validation"] = measured
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
