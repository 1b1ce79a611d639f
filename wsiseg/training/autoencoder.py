"""Training of the first stage: pixels to latents and back. Knows no labels and no diffusion.

Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (CVPR 2022),
appendix G; the perceptual term needs no downloaded network here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from wsiseg.datasets.augment import AugmentConfig, stain_jitter
from wsiseg.errors import ConfigError
from wsiseg.models.base import to_tensor
from wsiseg.models.extractors.latent import FirstStageConfig, build_first_stage, encode
from wsiseg.models.extractors.vit import ViT
from wsiseg.training.discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    fooling_loss,
    hinge_loss,
)
from wsiseg.training.perceptual import laplacian_l1, token_l1

BOTTLENECK = {"kl": 1e-4, "vq": 1.0}
"""Weight of the bottleneck's term where the configuration names none."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """Configuration of the first stage's training."""

    bottleneck_weight: float | None = None
    """Weight of the KL term, a mean over the latents' numbers (kl), or of codebook and commitment
    (vq); null takes 1e-4 for kl, our choice, and 1 for vq, as VQGAN does. As in VQGAN's code
    the codes move with weight 0.25 and the encoder with 1, not the other way round as in VQ-VAE."""
    edge_weight: float = 1.0
    """Weight of the L1 loss on horizontal and vertical differences, against blur."""
    laplacian_weight: float = 0.0
    """Weight of the L1 loss on the bands of a Laplacian pyramid; 0 = off."""
    feature_weight: float = 0.0
    """Weight of the L1 loss on the patch tokens of the encoder of the stage before; 0 = off."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """The patch discriminator."""

    def __post_init__(self) -> None:
        for name in ("bottleneck_weight", "edge_weight", "laplacian_weight", "feature_weight"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"autoencoder.{name}: must not be negative")


class AutoencoderTask:
    """L1 on pixels and their differences, the bottleneck's term and what is switched on.

    One optimiser serves autoencoder and discriminator: each gets the gradient of its own loss
    alone, so their sum can be minimised at once.

    Attributes:
        network: the first stage.
    """

    def __init__(
        self,
        first_stage: FirstStageConfig,
        config: AutoencoderConfig,
        augment: AugmentConfig,
        *,
        encoder: ViT | None = None,
    ) -> None:
        """`encoder`: what `feature_weight` compares by; not needed where that is 0."""
        self.first_stage, self.config, self.augment = first_stage, config, augment
        own = config.bottleneck_weight
        self.bottleneck_weight = BOTTLENECK[first_stage.kind] if own is None else own
        self.network = build_first_stage(first_stage)
        self.module = nn.ModuleDict({"network": self.network})
        self.discriminator: PatchDiscriminator | None = None
        if config.discriminator.weight:
            self.discriminator = PatchDiscriminator(config.discriminator)
            self.module["discriminator"] = self.discriminator
        self.encoder = None if encoder is None else encoder.eval().requires_grad_(False)

    def parameters(self) -> list[nn.Parameter]:
        """All parameters, the discriminator's among them."""
        return list(self.module.parameters())

    def losses(self, batch: object, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Reconstruction, bottleneck and adversarial losses of a batch (B, H, W, 3) uint8."""
        device = self.parameters()[0].device
        pixels = to_tensor(batch, device=device)  # type: ignore[arg-type]
        images = stain_jitter(pixels, self.augment, generator)
        rebuilt, bottleneck = self.reconstruct(images, generator)
        rebuilt = rebuilt.float()
        parts = self._reconstruction(images, rebuilt)
        loss = parts["reconstruction"] + self.bottleneck_weight * bottleneck
        psnr = -10 * torch.log10((rebuilt - images).square().mean() / 4)
        values = {"l1": parts["l1"], "bottleneck": bottleneck, "psnr": psnr, **parts}
        options = self.config.discriminator
        if self.discriminator is not None and step >= options.start_step:
            fooling = fooling_loss(self.discriminator, rebuilt)
            weight = torch.tensor(options.weight, device=device)
            if options.adaptive:
                net: Any = self.network
                last = net.decoder.conv_out.weight
                weight = weight * adaptive_weight(parts["reconstruction"], fooling, last)
            telling = hinge_loss(self.discriminator, images, rebuilt)
            loss = loss + weight * fooling + telling
            values |= {"fooling": fooling, "telling": telling, "adversarial_weight": weight}
        elif self.discriminator is not None:
            zero = loss.detach() * 0
            values |= {"fooling": zero, "telling": zero, "adversarial_weight": zero}
        return {"loss": loss, **values}

    def _reconstruction(self, images: Tensor, rebuilt: Tensor) -> dict[str, Tensor]:
        """`l1`, what is switched on beside it, and `reconstruction`, their weighted sum."""
        c = self.config
        l1 = (rebuilt - images).abs().mean()
        edges = sum((rebuilt.diff(dim=d) - images.diff(dim=d)).abs().mean() for d in (-1, -2))
        total, parts = l1 + c.edge_weight * edges, {"l1": l1}
        if c.laplacian_weight:
            parts["laplacian"] = laplacian_l1(rebuilt, images)
            total = total + c.laplacian_weight * parts["laplacian"]
        if c.feature_weight and self.encoder is not None:
            parts["features"] = token_l1(self.encoder, images, rebuilt)
            total = total + c.feature_weight * parts["features"]
        return {**parts, "reconstruction": total}

    def reconstruct(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """(reconstruction, bottleneck term); with a generator KL latents are sampled."""
        net: Any = self.network
        h = net.quant_conv(net.encoder(images))
        if self.first_stage.kind == "vq":
            z, term, _ = net.quantize(h)
        else:
            mean, log_variance = h.float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            term = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
            z = mean
            if generator is not None:
                noise = torch.randn(mean.shape, generator=generator).to(mean)
                z = mean + (0.5 * log_variance).exp() * noise
        return net.decoder(net.post_quant_conv(z)), term

    def after_step(self, step: int, gone: float) -> None:
        """Nothing."""


def latent_statistics(
    first_stage: nn.Module, config: FirstStageConfig, batches: Iterable[Tensor]
) -> FirstStageConfig:
    """The configuration with shift and scale that give latents mean 0 and deviation 1, over all
    batches of images together."""
    plain = replace(config, scale=1.0, shift=0.0)
    with torch.no_grad():
        latents = torch.cat([encode(first_stage, plain, images) for images in batches])
    return replace(config, scale=float(1 / latents.std()), shift=float(latents.mean()))


def decode(first_stage: nn.Module, config: FirstStageConfig, latents: Tensor) -> Tensor:
    """(B, 3, H, W) images, about [-1, 1], of scaled latents as `encode` gives them.

    VQ latents are quantised first.
    """
    net: Any = first_stage
    z = latents / config.scale + config.shift
    if config.kind == "vq":
        z = net.quantize(z)[0]
    images: Tensor = net.decoder(net.post_quant_conv(z))
    return images


def codes_used(first_stage: nn.Module, config: FirstStageConfig, images: Tensor) -> Tensor:
    """(codes,) bool: which codes of a VQ first stage the latents of images fall to."""
    net: Any = first_stage
    with torch.no_grad():
        latents = encode(first_stage, replace(config, scale=1.0, shift=0.0), images)
        index = net.quantize(latents)[2][2]
    return torch.bincount(index.flatten().cpu(), minlength=config.codes) > 0
