"""The FCN's first convolution, rewritten, equals the literal one: upsample, lay out, convolve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError
from wsiseg.models.base import FeatureSpec, lay_out
from wsiseg.models.heads.fcn import FCN, FCNConfig

TILE = 32
SPECS = [
    FeatureSpec(6, 16),
    FeatureSpec(4, 8),
    FeatureSpec(5, 16),
    FeatureSpec(3, 4),
    FeatureSpec(2, 2),
    FeatureSpec(1, 1),
]


def literal(head: FCN, features: tuple[Tensor, ...]) -> Tensor:
    """Each tile's map to 8 x 8, tiles side by side, maps concatenated, 3x3 convolution."""
    side = TILE // 4
    laid = []
    for maps in features:
        b, r, k = maps.shape[:3]
        big = nnf.interpolate(
            maps.flatten(0, 2), size=(side, side), mode="bilinear", align_corners=False
        )
        rows = [
            torch.cat([big.unflatten(0, (b, r, k))[:, i, j] for j in range(k)], dim=-1)
            for i in range(r)
        ]
        laid.append(torch.cat(rows, dim=-2))
    return nnf.conv2d(torch.cat(laid, dim=1), head.conv.weight, head.conv.bias, padding=1)


def features(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(
            2,
            rows,
            columns,
            s.channels,
            TILE // s.stride,
            TILE // s.stride,
            generator=generator,
            dtype=torch.float64,
        ).to(dtype)
        for s in SPECS
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (1, 1), (2, 4)])
@torch.inference_mode()
def test_first_convolution_is_exact(
    dtype: torch.dtype, tolerance: float, rows: int, columns: int
) -> None:
    torch.manual_seed(0)
    head = FCN(SPECS, 3, FCNConfig((16, 8, 8)), tile_px=TILE).to(dtype)
    maps = features(rows, columns, dtype)
    ours, theirs = head.first_convolution(maps), literal(head, maps)
    assert ours.shape == theirs.shape == (2, 16, rows * 8, columns * 8)
    scale = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) <= tolerance * scale
    border = torch.ones_like(theirs, dtype=torch.bool)
    border[..., 1:-1, 1:-1] = False
    assert float((ours - theirs)[border].abs().max()) <= tolerance * scale


def test_gradients_are_exact() -> None:
    torch.manual_seed(0)
    head = FCN(SPECS, 3, FCNConfig((16, 8, 8)), tile_px=TILE).double()
    maps = features(2, 2, torch.float64)
    weights = torch.randn(2, 16, 16, 16, dtype=torch.float64)
    found = []
    for output in (head.first_convolution(maps), literal(head, maps)):
        head.zero_grad()
        (output * weights).sum().backward()
        assert head.conv.weight.grad is not None
        found.append(head.conv.weight.grad.clone())
    assert torch.allclose(*found, rtol=1e-10, atol=1e-12)


@torch.inference_mode()
def test_lay_out_puts_tiles_in_their_places() -> None:
    maps = torch.arange(6.0).view(1, 2, 3, 1, 1, 1).expand(1, 2, 3, 1, 2, 2)
    assert lay_out(maps)[0, 0, ::2, ::2].tolist() == [[0, 1, 2], [3, 4, 5]]


@torch.inference_mode()
def test_logits_are_of_window_size() -> None:
    head = FCN(SPECS, 3, FCNConfig((16, 8, 8)), tile_px=TILE).eval()
    assert head(features(2, 3, torch.float32)).shape == (2, 3, 64, 96)


def test_a_tile_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="multiple of 4"):
        FCN([FeatureSpec(1, 1)], 2, FCNConfig(), tile_px=30)
