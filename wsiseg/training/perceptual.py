"""Terms of a reconstruction's loss beyond single pixels, without downloaded weights.

Knows no autoencoder. Sources: Burt and Adelson, The Laplacian Pyramid as a Compact Image Code
(1983), as a loss in Bojanowski et al., Optimizing the Latent Space of Generative Networks (ICML
2018); features of a network as in Johnson et al., Perceptual Losses (ECCV 2016), here of the
self-supervised encoder that the stage before has trained on the same tissue.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nnf

from wsiseg.models.extractors.vit import ViT

LEVELS = 4


def laplacian_l1(a: Tensor, b: Tensor, levels: int = LEVELS) -> Tensor:
    """Mean absolute difference of the bands of two Laplacian pyramids, summed over the levels.

    A band is what averaging 2 x 2 pixels and interpolating back loses.

    Args:
        a: (B, C, H, W) images.
        b: images of the same shape.
        levels: bands; fewer where the image is too small to be halved as often.
    """
    rest, total = a - b, a.new_zeros(())  # a pyramid is linear: that of the difference
    for _ in range(levels):
        if min(rest.shape[-2:]) < 4:
            break
        low = nnf.avg_pool2d(rest, 2)  # lies where bilinear interpolation expects it
        back = nnf.interpolate(low, size=rest.shape[-2:], mode="bilinear", align_corners=False)
        total = total + (rest - back).abs().mean()
        rest = low
    return total


def token_l1(encoder: ViT, images: Tensor, rebuilt: Tensor) -> Tensor:
    """Mean absolute difference of the patch tokens, after the last norm, of two batches.

    Args:
        encoder: frozen.
        images: (B, 3, H, W) in [-1, 1]; H and W multiples of the encoder's patch.
        rebuilt: of the same shape; gets the gradient.
    """
    with torch.no_grad():
        wanted = encoder.tokens(images)[:, 1:].float()
    return (encoder.tokens(rebuilt)[:, 1:].float() - wanted).abs().mean()
