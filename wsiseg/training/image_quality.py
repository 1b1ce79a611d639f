"""How alike two images are: PSNR and SSIM. Knows no networks.

Sources: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity
(IEEE TIP 2004), with its Gaussian window of 11 pixels and sigma 1.5, K1 0.01, K2 0.03.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nnf

WINDOW_PX = 11
SIGMA_PX = 1.5
RANGE = 2.0
"""Difference of white and black of images in [-1, 1]."""


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB of images (B, C, H, W) in [-1, 1]."""
    return 10 * torch.log10(RANGE**2 / (a - b).square().mean(dim=(1, 2, 3)).clamp_min(1e-12))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """(B,) mean structural similarity of images (B, C, H, W) in [-1, 1].

    Channels by themselves; windows that lie wholly in the image.

    Args:
        a: at least `WINDOW_PX` high and wide.
        b: of the same shape.
    """
    x = torch.cat((a, b, a * a, b * b, a * b)).to("cpu", torch.float64)  # not all GPUs have it
    mean_a, mean_b, aa, bb, ab = _blur(x).chunk(5)
    var_a, var_b, covariance = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    denominator = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return (numerator / denominator).mean(dim=(1, 2, 3)).float()


def _blur(x: Tensor) -> Tensor:
    """Weighted by a Gaussian window; valid windows only."""
    place = torch.arange(WINDOW_PX, dtype=x.dtype, device=x.device) - WINDOW_PX // 2
    window = torch.exp(-0.5 * (place / SIGMA_PX) ** 2)
    window = (window / window.sum()).expand(x.shape[1], 1, 1, -1)
    x = nnf.conv2d(x, window, groups=x.shape[1])
    return nnf.conv2d(x, window.transpose(-1, -2), groups=x.shape[1])
