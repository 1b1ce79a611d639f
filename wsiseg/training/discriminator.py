"""A patch discriminator against blurred reconstructions. Knows no autoencoder.

Sources: Isola et al., Image-to-Image Translation with Conditional Adversarial Networks (CVPR
2017), the discriminator of overlapping patches; Esser et al., Taming Transformers (CVPR 2021), the
hinge loss, the late start and the adaptive weight (eq. 7). Group norms stand for batch norms, so
that a crop is judged by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError

_MOST = 1e4
_GROUPS = 8


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Configuration of the patch discriminator."""

    weight: float = 0.0
    """Weight of the adversarial loss; 0 = no discriminator."""
    start_step: int = 0
    """Steps of the loop before it takes part."""
    channels: int = 64
    """Channels after its first layer, doubled by each of the following up to eight times that."""
    layers: int = 3
    """Layers that halve the size; 3 make patches of 70 px."""
    adaptive: bool = True
    """Whether the weight is multiplied by the ratio of the gradients that reconstruction and
    discriminator send into the decoder's last layer, at most 10,000."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.start_step < 0:
            raise ConfigError("discriminator: weight and start_step must not be negative")
        if self.layers < 1 or self.channels < _GROUPS or self.channels % _GROUPS:
            raise ConfigError(
                f"discriminator: layers must be at least 1, channels a multiple of {_GROUPS}"
            )

    @property
    def stride(self) -> int:
        """Image pixels per logit; crops must be at least four times as large."""
        return int(2**self.layers)


class PatchDiscriminator(nn.Module):
    """Convolutions of 4 x 4: a logit for every overlapping patch, high for real tissue."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        width = config.channels
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, config.layers + 1):
            wider, stride = config.channels * min(2**i, 8), 2 if i < config.layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride, 1, bias=False),
                nn.GroupNorm(_GROUPS, wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        self.net = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, h, w) logits of (B, 3, H, W) images in [-1, 1]."""
        logits: Tensor = self.net(images)
        return logits.float()


def fooling_loss(discriminator: nn.Module, rebuilt: Tensor) -> Tensor:
    """What a reconstruction loses by being seen through; sends nothing into the discriminator."""
    parameters = list(discriminator.parameters())
    for p in parameters:
        p.requires_grad_(False)
    loss: Tensor = -discriminator(rebuilt).mean()
    for p in parameters:
        p.requires_grad_(True)
    return loss


def hinge_loss(discriminator: nn.Module, images: Tensor, rebuilt: Tensor) -> Tensor:
    """Hinge loss of telling images from reconstructions; sends nothing into the latter."""
    real, fake = discriminator(torch.cat((images, rebuilt)).detach()).chunk(2)
    loss: Tensor = 0.5 * (nnf.relu(1 - real).mean() + nnf.relu(1 + fake).mean())
    return loss


def adaptive_weight(reconstruction: Tensor, fooling: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of the norms of two losses' gradients in a decoder's last layer, without gradient."""
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, fooling)
    ]
    ratio: Tensor = (norms[0] / (norms[1] + 1e-4)).clamp(0, _MOST).detach()
    return ratio
