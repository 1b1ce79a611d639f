"""Convolutions that take in the batch norm behind them: faster, and rounded less.

In evaluation a batch norm is an affine map of each channel, so it can be part of the convolution
that it follows: one pass over memory less and, in half precision, one rounding less. Folded are the
parts in `FOLDABLE`, whose batch norms are applied to what the child before them gives, as not all
networks of others do.

Source: Ioffe and Szegedy, Batch Normalization (ICML 2015), section 3.1, algorithm 2, step 11; the
folding itself is torch's `fuse_conv_bn_weights`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from wsiseg.models.base import FeatureExtractor, Head
from wsiseg.models.extractors.cnn import CNNExtractor
from wsiseg.models.heads.unet import UNetHead
from wsiseg.models.segmenter import Segmenter

FOLDABLE = (CNNExtractor, UNetHead)

_State = tuple[float, ...]
Part = TypeVar("Part", FeatureExtractor, Head)
_MADE: WeakKeyDictionary[nn.Module, tuple[_State, nn.Module]] = WeakKeyDictionary()


class _Pair(NamedTuple):
    """A convolution and the batch norm that is the next child of the same parent."""

    parent: nn.Module
    convolution: nn.Conv2d
    name: str
    norm: nn.BatchNorm2d


def _pairs(module: nn.Module) -> Iterator[_Pair]:
    """Pairs of children that stand one behind the other in an extractor or a head."""
    if type(module) not in FOLDABLE:
        return
    for parent in module.modules():
        for (_, one), (name, two) in pairwise(parent.named_children()):
            if isinstance(one, nn.Conv2d) and isinstance(two, nn.BatchNorm2d):
                yield _Pair(parent, one, name, two)


def fold(segmenter: Segmenter) -> Segmenter:
    """The segmenter with batch norms folded into the convolutions before them, for evaluation.

    All other weights are shared. Parts that were folded are kept as long as the part that they came
    from, and are made anew where its weights were changed or moved since. Where there is nothing to
    fold, and of a segmenter of another class, the segmenter itself is given back.

    Args:
        segmenter: in evaluation mode.
    """
    if type(segmenter) is not Segmenter:
        return segmenter
    extractor, head = _folded(segmenter.extractor), _folded(segmenter.head)
    if extractor is segmenter.extractor and head is segmenter.head:
        return segmenter
    return Segmenter(extractor, head, segmenter.info).eval()


def _folded(part: Part) -> Part:
    if next(_pairs(part), None) is None:
        return part
    state = _state(part)
    found = _MADE.get(part)
    if found is None or found[0] != state:
        found = _MADE[part] = state, _fold(part)
    return found[1]  # type: ignore[return-value]


def _state(part: nn.Module) -> _State:
    """What changes where weights or statistics are moved, replaced or changed, in any way."""
    tensors = (*part.parameters(), *part.buffers())
    # summed on the host, as not all devices know float64
    return tuple(n for t in tensors for n in (t.data_ptr(), float(t.detach().cpu().double().sum())))


def _fold(part: Part) -> Part:
    shared = {id(t): t for t in (*part.parameters(), *part.buffers())}
    found = copy.deepcopy(part, shared)
    for parent, convolution, name, norm in list(_pairs(found)):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            convolution.weight, convolution.bias = fuse_conv_bn_weights(
                convolution.weight,
                convolution.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
        # timm's batch norms apply the activation too
        setattr(parent, name, getattr(norm, "act", nn.Identity()))
    return found.eval()


def round_weights(segmenter: Segmenter) -> None:
    """Round weights, in place, so that half precision computes with nearly those of float32.

    Each weight of a convolution or a linear layer becomes the nearest value that bfloat16 holds,
    where a batch norm follows: once that is folded into it. Otherwise the rounding of weights is
    most of what half precision changes, as it is the same at all pixels.

    Args:
        segmenter: in evaluation mode, in float32, on the CPU.
    """
    parts = (segmenter.extractor, segmenter.head)
    factors: dict[nn.Module, torch.Tensor] = {
        pair.convolution: _factor(pair.norm) for part in parts for pair in _pairs(part)
    }
    for layer in segmenter.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            weight, factor = layer.weight.detach(), factors.get(layer)
            if factor is None:
                layer.weight.data = weight.bfloat16().to(weight.dtype)
            else:
                rounded = (weight.double() * factor).bfloat16().double() / factor
                layer.weight.data = torch.where(factor == 0, weight, rounded).to(weight.dtype)


def _factor(norm: nn.BatchNorm2d) -> torch.Tensor:
    """(C, 1, 1, 1) float64, by which a batch norm multiplies in evaluation."""
    assert norm.running_var is not None
    factor = norm.weight.detach().double() * (norm.running_var.double() + norm.eps).rsqrt()
    return factor.view(-1, 1, 1, 1)
