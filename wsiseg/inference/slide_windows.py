"""The windows in which slides are gone through, where they are not those of the checkpoint."""

from __future__ import annotations

from dataclasses import replace

import torch

from wsiseg.config import from_mapping
from wsiseg.inference.runtime import CompiledExtractor
from wsiseg.models.extractors.cnn import CNNExtractor
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.models.segmenter import Segmenter

WINDOW_PX = 768
"""Side that a convolutional network's window has on slides at least."""


def for_slides(segmenter: Segmenter) -> Segmenter:
    """The segmenter that goes through slides: in windows without borders of tiles, large enough.

    Windows of 2 x 2 tiles become windows of one tile. As they overlap by a third they share no
    tiles, and the border in the middle of a window, where its weight is largest, lies in no other
    one: what extractors do not see beyond it would show. Single tiles that overlap by a third cost
    as much and have their borders where their weight is least.

    A convolutional network that sees its whole window at once (tile = window) and takes tiles of
    any side is often trained on small ones. On a slide most of a small window lies near its
    borders, where the network sees nothing beyond. Overlaps of two thirds hide that, at four times
    the work; larger windows hide it better. The side is the least multiple of the trained one that
    has 768 px. All other segmenters are given back as they are, and so are those of `to_openvino`,
    which are compiled for the windows that they have.

    Args:
        segmenter: any; what is given back has its weights, not copies of them.
    """
    compiled = isinstance(segmenter.extractor, CompiledExtractor)
    if type(segmenter) is not Segmenter or compiled:
        return segmenter
    if segmenter.info.window_px == 2 * segmenter.info.tile_px:
        segmenter = _of_one_tile(segmenter)
    if isinstance(segmenter.extractor, CNNExtractor):
        return _enlarged(segmenter)
    return segmenter


def _of_one_tile(segmenter: Segmenter) -> Segmenter:
    info = segmenter.info
    config = {**info.config, "window_px": info.tile_px} if info.config else {}
    info = replace(info, window_px=info.tile_px, config=config)
    return Segmenter(segmenter.extractor, segmenter.head, info).eval()


def _enlarged(segmenter: Segmenter) -> Segmenter:
    info = segmenter.info
    if info.window_px != info.tile_px or info.window_px >= WINDOW_PX or not info.config:
        return segmenter  # without its configuration it cannot be built for another window
    side = -(-WINDOW_PX // info.tile_px) * info.tile_px
    larger = {**info.config, "extractor": {**info.config["extractor"], "tile_px": side}}
    larger |= {"window_px": side, "resize_px": None}  # slides are never stretched
    with torch.device("meta"):
        found = build_segmenter(from_mapping(ModelConfig, larger))
    found.load_state_dict(segmenter.state_dict(), assign=True)
    found.info = replace(info, window_px=side, tile_px=side)
    return found.requires_grad_(False).eval()
