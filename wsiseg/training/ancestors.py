"""What a card keeps of what its model was trained from: one flat list, and no image twice.

Cards of earlier versions hold the whole card of the start, that of its own start inside, and so on.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

IMAGES, CONTENTS = "training_images", "training_contents"
"""Names and checksums of images: first `learnt` that were trained on, then those of validation."""
GROUPS, HELD = "training_groups", "validation_groups"
"""Groups of all of these images, and of those of validation."""
BACKGROUND = "background_contents"
"""Checksums of the images of `background.annotated`."""
LEARNT = "learnt"
"""How many of the images that a kept card lists were trained on; `images` counts all there were."""
LISTS = (IMAGES, CONTENTS, GROUPS, HELD, BACKGROUND)
KEPT = (
    *("name", "sha256", "licence", "terms", "wsiseg"),
    *("dataset", "images", "initial", "trainable"),
    *("pretraining", "summary", "sources", "unet_weights"),
)
"""What else is kept of a card."""
MOST_BYTES = 1_500_000
"""Characters of all that is kept."""


def chain(card: Any) -> list[Mapping[str, Any]]:
    """A card, then those of what its model was trained from, the nearest first."""
    cards: list[Mapping[str, Any]] = []
    older: list[Any] = []
    while isinstance(card, Mapping):
        cards.append(card)
        listed = card.get("ancestors")
        older += listed if isinstance(listed, list) else []
        card = card.get("extractor")
    return cards + [c for c in older if isinstance(c, Mapping)]


def listed(card: Mapping[str, Any], key: str) -> list[str]:
    """The names or checksums that a card lists."""
    found = card.get(key)
    return [v for v in found if isinstance(v, str)] if isinstance(found, list) else []


def learnt_count(card: Mapping[str, Any]) -> int:
    """How many of the images that a card lists were trained on, the first ones; else all."""
    images = card.get("images")
    count = card.get(LEARNT, images.get("training") if isinstance(images, Mapping) else None)
    every = max(len(listed(card, IMAGES)), len(listed(card, CONTENTS)))
    return count if isinstance(count, int) and 0 <= count <= every else every


def lists_images(card: Mapping[str, Any]) -> bool:
    """Whether a card tells which images its model has learnt from."""
    return IMAGES in card or CONTENTS in card


def kept_of(card: Mapping[str, Any], *, with_head: bool) -> list[dict[str, Any]]:
    """What is kept of a start's card and of those of what it was trained from.

    Images that only a head has learnt from, one that is not gone on with, are left out.
    """
    cards = []
    for about in chain(card):
        kept = {k: about[k] for k in (*KEPT, LEARNT, *LISTS) if k in about}
        training = about.get("training")
        if isinstance(training, Mapping):
            kept["trainable"] = training.get("trainable")
        if kept.get("trainable") == "none" and not with_head:
            kept = {k: v for k, v in kept.items() if k not in LISTS}
        cards.append(kept)
    return cards


def without_repeats(
    own: Mapping[str, Any], cards: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The cards that are kept on a new one, without what a nearer one of the same data lists.

    Args:
        own: the new card.
        cards: of `kept_of`.
    """
    known: dict[str, set[Any]] = {}
    background: set[str] = set()
    result = []
    for card in (own, *cards):
        lists = _new_lists(card, known.setdefault(_data_of(card), set()))
        lists[BACKGROUND] = [c for c in listed(card, BACKGROUND) if c not in background]
        background.update(lists[BACKGROUND])
        left = (*LISTS, LEARNT, "extractor", "ancestors")
        short = {k: v for k, v in card.items() if k not in left}
        result.append(short | {k: v for k, v in lists.items() if v or k == LEARNT})
    return _within(result[1:])


def _new_lists(card: Mapping[str, Any], seen: set[Any]) -> dict[str, Any]:
    """The images and groups of a card that were not `seen`, which grows."""
    count, held = learnt_count(card), set(listed(card, HELD))
    pairs = list(zip_longest(listed(card, IMAGES), listed(card, CONTENTS)))
    groups = sorted(listed(card, GROUPS), key=lambda group: group in held)
    trained = sum(group not in held for group in groups)
    images = _unseen(pairs[:count], pairs[count:], seen)
    learnt, validated = _unseen(groups[:trained], groups[trained:], seen)
    return {
        LEARNT: len(images[0]),
        IMAGES: [name for part in images for name, _ in part if name is not None],
        CONTENTS: [c for part in images for _, c in part if c is not None],
        GROUPS: learnt + validated,
        HELD: validated,
    }


def _data_of(card: Mapping[str, Any]) -> str:
    """Which data set a card is of, whatever fold is left out."""
    data = card.get("dataset")
    data = data if isinstance(data, Mapping) else {}
    return json.dumps({k: v for k, v in data.items() if k != "left out"}, sort_keys=True)


def _unseen(
    learnt: Sequence[Any], held: Sequence[Any], seen: set[Any]
) -> tuple[list[Any], list[Any]]:
    """What was not `seen`, which grows. That something was validated on nearer by does not say
    that it was learnt from further away."""
    first = [v for v in learnt if (v, True) not in seen]
    second = [v for v in held if not {(v, True), (v, False)} & seen]
    seen.update((v, True) for v in learnt)
    seen.update((v, False) for v in held)
    return first, second


def _within(cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, the furthest without their names, then without checksums, if it is too much."""
    size, before = len(json.dumps(cards)), sum(map(lists_images, cards))
    for keys in ((IMAGES, GROUPS, HELD, "dataset"), (CONTENTS, BACKGROUND)):
        for card in reversed(cards):
            if size <= MOST_BYTES:
                break
            size -= sum(len(json.dumps(card.pop(k))) for k in keys if k in card)
    if lost := before - sum(map(lists_images, cards)):
        warnings.warn(
            f"the card has no room for the images of {lost} earlier trainings; wsiseg evaluate "
            "will not know them",
            stacklevel=2,
        )
    return cards
