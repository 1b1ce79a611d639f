"""Test-time augmentation: a segmenter that sees every tile flipped and turned, and averages.

The maps of all views are kept side by side as one tuple of features, so whoever runs the segmenter
shares tiles between windows as ever; a window's views are undone before they are averaged. Knows
no particular network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wsiseg.geometry import Point
from wsiseg.models.base import Features
from wsiseg.models.segmenter import Segmenter

VIEWS = 8
"""The symmetries of a square: four quarter turns, each as it is and flipped."""


class ViewedSegmenter(Segmenter):
    """The mean of a segmenter's probabilities over the eight views of its input.

    The noise of a place is the same in all views. Costs eight times the segmenter's work and
    holds eight times its features.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        """Views of `segmenter`, whose networks it shares."""
        super().__init__(segmenter.extractor, segmenter.head, segmenter.info)
        self._own = (segmenter,)  # in a tuple: not a submodule, its networks are here already
        self.map_specs = segmenter.map_specs * VIEWS

    def tile_features(self, tiles: Tensor, places: Sequence[Point], seed: int) -> Features:
        """The features of each view of the tiles, view by view."""
        own = self._own[0]
        return tuple(
            maps
            for view in range(VIEWS)
            for maps in own.tile_features(seen(tiles, view, (2, 3)), places, seed)
        )

    def window_probabilities(self, features: Features) -> Tensor:
        """Mean probabilities; see the class of the contract."""
        return self.judge(features)[0]

    def judge(self, features: Features) -> tuple[Tensor, Tensor | None]:
        """Mean probabilities and mean uncertainty."""
        count = len(features) // VIEWS
        found, doubts = [], []
        for view in range(VIEWS):
            maps = features[view * count : (view + 1) * count]
            part, doubt = self._own[0].judge(tuple(seen(m, view, (1, 2)) for m in maps))
            found.append(unseen(part, view, (2, 3)))
            if doubt is not None:
                doubts.append(unseen(doubt, view, (1, 2)))
        mean = torch.stack(found).mean(dim=0)
        return mean, torch.stack(doubts).mean(dim=0) if doubts else None


def seen(values: Tensor, view: int, axes: tuple[int, int]) -> Tensor:
    """Values flipped along the second axis (view >= 4), then turned by view % 4 quarters."""
    flipped = values.flip(axes[1]) if view >= 4 else values
    return torch.rot90(flipped, view % 4, axes).contiguous()


def unseen(values: Tensor, view: int, axes: tuple[int, int]) -> Tensor:
    """Undo `seen`."""
    turned = torch.rot90(values, -(view % 4), axes)
    return turned.flip(axes[1]) if view >= 4 else turned
