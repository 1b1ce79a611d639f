"""What a run trains with: its images, those that it validates on, and the record of both.

Trains nothing.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from wsiseg.atomic import staged
from wsiseg.datasets.base import LabelledDataset, class_pixels, grouped_split
from wsiseg.errors import DatasetError, UsageError
from wsiseg.models import storage
from wsiseg.models.base import FeatureExtractor
from wsiseg.models.registry import extractor_mapping
from wsiseg.training.contents import Contents, contents_of
from wsiseg.training.losses import frequency_weights
from wsiseg.training.processes import Processes
from wsiseg.training.train_config import TrainConfig


class Inputs(NamedTuple):
    """What a run trains with.

    Attributes:
        dataset: labelled images.
        training: indices to train on.
        validation: indices that choose the best weights; may be empty.
        pixels: (N, C) labelled pixels of the training images.
        weights: (C,) class weights of the loss, or None.
        unseen: names of classes that training images have and no validation image, if there are
            any.
        contents: of the training images, then of those of validation, once they were read.
    """

    dataset: LabelledDataset
    training: Sequence[int]
    validation: Sequence[int]
    pixels: npt.NDArray[np.int64]
    weights: Tensor | None = None
    unseen: Sequence[str] = ()
    contents: Contents = Contents()

    def read(self) -> Inputs:
        """The same with `contents`: each image is read once, and none is kept.

        Raises:
            DatasetError, SlideError: an image or its labels cannot be read.
        """
        used = (*self.training, *self.validation)
        return self._replace(contents=contents_of(self.dataset, used))

    def described(self) -> str:
        """A line on what is trained with."""
        shares = self.pixels.sum(axis=0) / max(1, self.pixels.sum())
        names = self.dataset.classes.names
        classes = ", ".join(f"{n} {s:.1%}" for n, s in zip(names, shares, strict=True))
        return (
            f"training on {len(self.training)} images, validating on {len(self.validation)}; "
            f"labelled pixels: {classes}"
        )


def choose_inputs(config: TrainConfig, dataset: LabelledDataset) -> Inputs:
    """The images to train and to validate on, and the class weights; all their masks are read.

    Raises:
        DatasetError: no image is left to train on; a class without pixels; a mask that cannot be
            read or holds a value that is no class; no labelled pixel to validate on.
        UsageError: a limit above the number of images.
    """
    training, held = _divided(config, dataset)
    pixels = class_pixels(dataset, training)
    counts = pixels.sum(axis=0)
    names = dataset.classes.names
    empty = [name for name, n in zip(names, counts, strict=True) if n == 0]
    if empty and not config.allow_empty_classes:
        raise DatasetError(
            f"no pixel of class {empty[0]!r} in the {len(training)} training images; give more "
            "images, leave the class out, or set allow_empty_classes: true"
        )
    weights = None
    if config.loss.class_weights == "frequency":
        weights = frequency_weights(counts.tolist(), names=names, allow_empty=True)
    there = class_pixels(dataset, held).sum(axis=0)
    if held and not there.any():
        raise DatasetError(
            f"none of the {len(held)} validation images has a labelled pixel, so they cannot "
            "choose the best weights; give another seed or validation_share, or set "
            "validation_share to 0"
        )
    unseen = [n for n, k, v in zip(names, counts, there, strict=True) if held and k and not v]
    return Inputs(dataset, training, held, pixels, weights, unseen)


def _divided(config: TrainConfig, dataset: LabelledDataset) -> tuple[list[int], list[int]]:
    """Indices to train and to validate on."""
    if not len(dataset):
        raise DatasetError("the part of the data set holds no image; choose another --split")
    training, held = grouped_split(dataset.groups, config.validation_share, config.seed)
    if not training:
        raise DatasetError(
            f"all {len(dataset)} images are of one group, which validation takes; "
            "set validation_share to 0 or give more images"
        )
    if config.limit:
        if config.limit > len(training):
            raise UsageError(
                f"limit {config.limit}: only {len(training)} images are left for training"
            )
        order = np.random.default_rng((config.seed, 3)).permutation(len(training))
        training = sorted(training[int(i)] for i in order[: config.limit])
    return training, held


def warn_of_unseen(inputs: Inputs) -> None:
    """Warn of classes that are trained and that no validation image has."""
    if inputs.unseen:
        warnings.warn(
            f"no validation image has a pixel of {', '.join(inputs.unseen)}: the Dice that chooses "
            "the best weights is over the other classes; give another seed or validation_share, or "
            "more images",
            stacklevel=2,
        )


def claim_inputs(
    out: Path,
    inputs: Inputs,
    extractor: FeatureExtractor,
    *,
    background: Sequence[str],
    resumed: bool,
) -> str:
    """Keep which extractor, images and labels a run has; refuse others, in any process.

    Args:
        out: the run folder.
        inputs: as they were read.
        extractor: as it starts.
        background: names of background images.
        resumed: whether the run has done a step before.

    Returns:
        A digest of them: the same features belong to it and the configuration.

    Raises:
        UsageError: they are not those that the run was started with.
        OutputError: the record cannot be written.
    """
    names = inputs.dataset.names
    record_of = {
        "extractor": storage.fingerprint(extractor_mapping(extractor), extractor.state_dict()),
        "classes": inputs.dataset.classes.to_list(),
        "mpp": inputs.dataset.mpp,
        "images": [names[i] for i in inputs.training],
        "validation": [names[i] for i in inputs.validation],
        "contents": inputs.contents.images,
        "labels": inputs.contents.labels,
        "background": background,
    }
    text = json.dumps(record_of)
    record = out / "inputs.json"
    if Processes().first and not (resumed and record.exists()):
        with staged(record) as (temporary,):
            temporary.write_text(text)
    Processes().wait()
    if record.read_text() != text:
        raise UsageError(
            f"{out}: was started with another extractor, other images or labels, or by another"
            " version of wsiseg; use another --out"
        )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
