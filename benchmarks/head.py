"""The FCN's rewritten first convolution against the plain one over the concatenated maps.

    python benchmarks/head.py --model full

Same weights, same random features. The results must agree to 1e-5 of their largest value. The
arithmetic is counted by torch (convolutions and products of matrices, which upsample in the
rewritten way; the plain way's bilinear upsampling is not counted), the largest tensor by watching
every operator, and the peak memory of each way in a process of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import click
import torch
from literal_pipeline import first_convolution, plain_head
from shared import run
from stand_ins import FULL, model_option, stand_in
from timing import MIB, Memory, Row, Span, in_child, open_row, row_options, timed, watched
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from wsiseg.models.base import Features
from wsiseg.models.heads.fcn import FCN, FCNConfig
from wsiseg.models.registry import extractor_skeleton

MAX_ERROR = 1e-5
MIN_FLOPS = 4.0
MAX_TENSOR_MIB = 1000.0
Way = Callable[[FCN, Features], Tensor]
WAYS: dict[str, Way] = {
    "rewritten": lambda head, features: head.first_convolution(features),
    "plain": first_convolution,
}


class LargestTensor(TorchDispatchMode):
    """Watches operators.

    Attributes:
        bytes: size of the largest tensor that one gave.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at what it gives."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


def fcn_and_features(model: str) -> tuple[FCN, Features]:
    """The head of a model and random features of one window.

    Of the full-size model only the head is made.
    """
    if model == "full":
        extractor = extractor_skeleton(dict(FULL), whole=False)
        torch.manual_seed(0)
        head = FCN(extractor.specs, 6, FCNConfig(), tile_px=extractor.tile_px).eval()
        tile, side = extractor.tile_px, 3
    else:
        segmenter = stand_in(model)
        head, tile = plain_head(segmenter), segmenter.info.tile_px
        side = segmenter.info.window_px // tile
    generator = torch.Generator().manual_seed(1)
    features = tuple(
        torch.randn(
            1, side, side, s.channels, tile // s.stride, tile // s.stride, generator=generator
        )
        for s in head.specs
    )
    return head, features


def peak(model: str, way: str, threads: int) -> dict[str, Any]:
    """Memory that one way adds at its peak, in MiB; for a process of its own."""
    torch.set_num_threads(threads)
    head, features = fcn_and_features(model)
    memory = Memory()
    with torch.inference_mode(), watched(memory):
        WAYS[way](head, features)
    return {"mib": memory.mib}


def arithmetic(way: Way, head: FCN, features: Features) -> tuple[int, int]:
    """FLOPs, and bytes of the largest tensor; follows the shapes and computes nothing."""
    counter, largest = FlopCounterMode(display=False), LargestTensor()
    shapes = copy.deepcopy(head).to("meta")
    maps = tuple(feature.to("meta") for feature in features)
    with torch.no_grad():
        with counter:
            way(shapes, maps)
        with largest:
            way(shapes, maps)
    return counter.get_total_flops(), largest.bytes


def compare(row: Row, head: FCN, features: Features) -> None:
    """Equality, then arithmetic, tensors and seconds of both ways."""
    results: dict[str, Tensor] = {}
    spans = {name: Span() for name in WAYS}
    with torch.inference_mode():
        for name, way in WAYS.items():
            with timed(spans[name]):
                results[name] = way(head, features)
    plain = results["plain"]
    error = float((results["rewritten"] - plain).abs().max() / plain.abs().max())
    row.equal(f"relative difference {error:.2g}, at most {MAX_ERROR:g}", error <= MAX_ERROR)
    counted = {name: arithmetic(way, head, features) for name, way in WAYS.items()}
    ratio = counted["plain"][0] / counted["rewritten"][0]
    row.judge("FLOPs, plain / rewritten", ratio, ">=", MIN_FLOPS)
    largest = counted["rewritten"][1] / MIB
    row.judge("largest tensor of the rewritten, MiB", largest, "<=", MAX_TENSOR_MIB)
    for name in WAYS:
        row.note(
            **{
                f"{name}, GFLOP": counted[name][0] / 1e9,
                f"{name}, largest tensor in MiB": counted[name][1] / MIB,
                f"{name}, seconds": spans[name].wall,
            }
        )
    row.note(gain=spans["plain"].wall / spans["rewritten"].wall)


@click.command(help=__doc__.splitlines()[0])
@row_options
@model_option
@click.option("--memory/--no-memory", default=True, help="Peak memory, in processes of their own.")
def main(**words: Any) -> None:
    """Compare both ways."""
    row = open_row("head: first convolution", words)
    head, features = fcn_and_features(words["model"])
    row.note(model=words["model"], channels=head.conv.in_channels)
    compare(row, head, features)
    if words["memory"]:
        for way in WAYS:
            found = in_child(peak, words["model"], way, torch.get_num_threads())
            row.note(**{f"{way}, peak memory in MiB": found["mib"]})
    row.finish()


if __name__ == "__main__":
    run(main)
