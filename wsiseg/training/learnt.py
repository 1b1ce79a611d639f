"""Warnings where a model is measured, or chosen, on images that it has learnt from.

Cards hold checksums of images; those of earlier versions only names. Of the same part of a data
set groups tell, too: of the same patients there may be images that were not trained on, or images
cut in another way.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from wsiseg.datasets.base import LabelledDataset, Subset
from wsiseg.training.ancestors import (
    BACKGROUND,
    CONTENTS,
    GROUPS,
    HELD,
    IMAGES,
    chain,
    learnt_count,
    listed,
)
from wsiseg.training.contents import contents_of
from wsiseg.training.inputs import Inputs

_OF_LABELS = ("classes", "ignore", "terms", "group", "parts", "masks", "instances", "cache_mb")
"""Options of data sets that say nothing of the images."""
_OF_CUTTING = ("cut", "patch_px", "stride_px", "max_ignored", "min_labelled", "mpp")
"""Options of how images are cut out of files."""


def warn_of_training_images(
    card: Mapping[str, Any], described: Mapping[str, Any], dataset: LabelledDataset, *, part: str
) -> None:
    """Warn where a model, or what it was trained from, has learnt from what it is measured on.

    Args:
        card: the model's.
        described: options of the data set.
        dataset: what is to be measured; its images are read if the card holds checksums.
        part: of the data set.

    Raises:
        DatasetError, SlideError: an image cannot be read.
    """
    cards = chain(card)
    contents: Sequence[str] = ()
    if any(listed(about, key) for about in cards for key in (CONTENTS, BACKGROUND)):
        contents = contents_of(dataset, range(len(dataset))).images
    if found := _found(cards, {**described, "part": part}, dataset, contents):
        warnings.warn(
            f"{found} the model's training: these numbers do not say how good it is", stacklevel=2
        )


def warn_of_learnt_validation(
    provenance: Mapping[str, Any], inputs: Inputs, background: Sequence[str]
) -> None:
    """Warn where validation images are among those that are, or were, trained on.

    Args:
        provenance: what the card will say of data and extractor.
        inputs: as they were read.
        background: checksums of annotated background images.
    """
    held = Subset(inputs.dataset, inputs.validation)
    contents = inputs.contents.images[len(inputs.training) :]
    described = {"name": None, "part": None, **provenance.get("dataset", {})}
    described.pop("left out", None)
    cards = [_trained(c) for c in chain(provenance)[1:]]
    if found := _found(cards, described, held, contents, what="validation images"):
        warnings.warn(
            f"{found} the training of what this one starts from: the best weights and the "
            "temperature are chosen on what is known already, and the validation's numbers look "
            "too good; keep the images and the seed of that training, or give another --extractor",
            stacklevel=2,
        )
    if shown := len(_places(contents, background)):
        warnings.warn(
            f"{shown} of the {len(held)} validation images are in background.annotated, too: they "
            "are trained on; leave them out there",
            stacklevel=2,
        )


def _trained(card: Mapping[str, Any]) -> dict[str, Any]:
    """A card without the images that were only validated on, nor groups that may be theirs."""
    count, images = learnt_count(card), card.get("images")
    groups, held = listed(card, GROUPS), set(listed(card, HELD))
    if not held and isinstance(images, Mapping) and images.get("validation"):
        groups = []  # a card of an earlier version does not tell them apart
    return {
        **card,
        IMAGES: listed(card, IMAGES)[:count],
        CONTENTS: listed(card, CONTENTS)[:count],
        GROUPS: [g for g in groups if g not in held],
    }


def _found(
    cards: Sequence[Mapping[str, Any]],
    described: Mapping[str, Any],
    dataset: LabelledDataset,
    contents: Sequence[str],
    *,
    what: str = "images",
) -> str:
    """How many images of a data set the cards know, in words; empty if none.

    Args:
        cards: of a model and of what it was trained from.
        described: options of the data set, and its `part`.
        dataset: the images.
        contents: their checksums, if the cards hold some.
        what: they are called.
    """
    options = {k: v for k, v in described.items() if k != "part"}
    seen: set[int] = set()
    grouped: set[int] = set()
    for about in cards:
        held = listed(about, CONTENTS)
        own = about.get("dataset")
        own = own if isinstance(own, Mapping) else None
        seen |= _places(contents, listed(about, BACKGROUND))
        if held:
            seen |= _places(contents, held)
        elif own is not None and _fits(own, options, but=_OF_LABELS):
            seen |= _places(dataset.names, listed(about, IMAGES))
        if (
            own is not None
            and own.get("part") == described["part"]
            and _fits(own, options, but=(*_OF_LABELS, *_OF_CUTTING))
            and not (held and _others(about, options, dataset.names, contents))
        ):
            grouped |= _places(dataset.groups, listed(about, GROUPS))
    if not (seen or grouped):
        return ""
    relation = "were in" if len(seen) >= len(grouped) else "are of patients or slides of"
    return f"{max(len(seen), len(grouped))} of the {len(dataset)} {what} {relation}"


def _places(values: Sequence[str], known: Sequence[str]) -> set[int]:
    """Where in `values` those stand that are among the `known`."""
    among = set(known)
    return {i for i, value in enumerate(values) if value in among}


def _others(
    card: Mapping[str, Any],
    described: Mapping[str, Any],
    names: Sequence[str],
    contents: Sequence[str],
) -> bool:
    """Whether images of the same names are others than those of a card: another folder's, whose
    groups say nothing. Of images cut from larger ones that cannot be told."""
    trained = listed(card, IMAGES), listed(card, CONTENTS)
    held = dict(zip(*trained, strict=False))
    changed = any(held.get(n, c) != c for n, c in zip(names, contents, strict=True))
    return "patch_px" not in described and changed


def _fits(own: Mapping[str, Any], described: Mapping[str, Any], *, but: Sequence[str]) -> bool:
    """Whether options of a data set are those that a card names."""
    return all(own.get(k) == v for k, v in described.items() if k not in but)
