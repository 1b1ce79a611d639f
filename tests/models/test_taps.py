"""Taps against hooks on diffusers' own forward, and HIPT's positions against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compvis_layout import dino_vit, vit_cls
from torch import Tensor
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError
from wsiseg.models.extractors.latent import (
    TAP_COUNT,
    FirstStageConfig,
    UNetConfig,
    build_first_stage,
    build_unet,
    detail_layout,
    encode_with_details,
    read_taps,
    tap_layout,
)
from wsiseg.models.extractors.pathsegdiff import PathSegDiffConfig
from wsiseg.models.extractors.vit import ViT, ViTConfig

CONFIG = UNetConfig(channels=(32, 64, 32, 96), context_dim=24)


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return build_unet(CONFIG, 3).eval().requires_grad_(False)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 3, 16, 16, generator=generator)
    return latents, torch.randn(2, 2, 24, generator=generator)


def hooked(unet: Any, timestep: int) -> list[Tensor]:
    """The 13 activations that diffusers' own forward goes through."""
    places = [unet.mid_block]
    for number, block in enumerate(unet.up_blocks):
        layers = block.resnets if number == 3 else block.attentions
        places.extend(layers)
        if number < 3:
            places[-1] = block.upsamplers[0]
    found: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [place.register_forward_hook(keep) for place in places]
    latents, context = inputs()
    unet(latents, timestep, encoder_hidden_states=context)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("timestep", [0, 50, 999])
@torch.inference_mode()
def test_taps_are_what_the_full_forward_goes_through(unet: Any, timestep: int) -> None:
    expected = hooked(unet, timestep)
    latents, context = inputs()
    found = read_taps(unet, latents, timestep, context, range(TAP_COUNT))
    assert len(found) == len(expected) == TAP_COUNT
    for ours, theirs, (channels, reduction) in zip(
        found, expected, tap_layout(CONFIG), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert ours.shape == (2, channels, 16 // reduction, 16 // reduction)


@pytest.mark.parametrize("tap", range(TAP_COUNT))
@torch.inference_mode()
def test_a_single_tap_stops_early(unet: Any, tap: int) -> None:
    expected = hooked(unet, 50)
    ran: list[int] = []
    resnets = [r for block in unet.up_blocks for r in block.resnets]
    handles = [
        r.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, r in enumerate(resnets)
    ]
    latents, context = inputs()
    found = read_taps(unet, latents, 50, context, [tap])
    for handle in handles:
        handle.remove()
    assert len(found) == 1
    assert torch.equal(found[0], expected[tap])
    assert ran == list(range(tap))


@torch.inference_mode()
def test_taps_come_in_the_order_asked_for(unet: Any) -> None:
    expected = hooked(unet, 50)
    latents, context = inputs()
    found = read_taps(unet, latents, 50, context, (0, 5, 9))
    for ours, tap in zip(found, (0, 5, 9), strict=True):
        assert torch.equal(ours, expected[tap])


def test_a_denoiser_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="four levels"):
        UNetConfig(channels=(32, 64))


@pytest.fixture(scope="module")
def vit() -> ViT:
    net = ViT(ViTConfig(dim=128, depth=2, heads=2)).eval().requires_grad_(False)
    net.net.load_state_dict(dino_vit(128, 2, 3), strict=True)
    return net


@pytest.mark.parametrize("side", [224, 256, 64])
@torch.inference_mode()
def test_encoder_equals_a_plain_forward(vit: ViT, side: int) -> None:
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = vit_cls(dino_vit(128, 2, 3), images, 2)
    found = vit(images)
    assert found.shape == (2, 128)
    assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@torch.inference_mode()
def test_positions_are_interpolated_by_scale_factor(vit: ViT) -> None:
    table = vit.net.pos_embed
    assert torch.equal(vit._positions(14, 14), table)
    found = vit._positions(16, 16)
    assert found.shape == (1, 257, 128)
    assert torch.equal(found[:, :1], table[:, :1])
    grid = table[:, 1:].reshape(1, 14, 14, 128).permute(0, 3, 1, 2)
    by_factor = nnf.interpolate(grid, scale_factor=16.1 / 14, mode="bicubic")
    assert torch.allclose(found[:, 1:], by_factor.flatten(2).transpose(1, 2), atol=1e-6)
    by_size = nnf.interpolate(grid, size=(16, 16), mode="bicubic")
    assert not torch.allclose(found[:, 1:], by_size.flatten(2).transpose(1, 2), atol=1e-4)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_details_are_what_diffusers_own_encoder_goes_through(kind: Any) -> None:
    config = FirstStageConfig(kind=kind, channels=(8, 16, 24), layers=1, groups=4, scale=2.0)
    torch.manual_seed(0)
    net: Any = build_first_stage(config).eval().requires_grad_(False)
    found: list[Tensor] = []
    for block in net.encoder.down_blocks:
        block.resnets[-1].register_forward_hook(lambda m, a, output: found.append(output))
    images = torch.randn(2, 3, 32, 32)
    expected = net.quant_conv(net.encoder(images))[:, : config.latent_channels] * 2
    own = list(found)
    latents, details = encode_with_details(net, config, images, (1, 2))
    assert torch.equal(latents, expected)
    assert detail_layout(config) == {1: 8, 2: 16}
    assert [d.shape for d in details] == [(2, 8, 32, 32), (2, 16, 16, 16)]
    assert all(torch.equal(a, b) for a, b in zip(details, own, strict=False))


def test_details_out_of_order_or_too_coarse_are_refused() -> None:
    first_stage = FirstStageConfig(channels=(8, 16, 24), groups=4)
    for details in ((2, 1), (4,), (1, 1)):
        with pytest.raises(ConfigError, match="details"):
            PathSegDiffConfig(first_stage=first_stage, details=details)
