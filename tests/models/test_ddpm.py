"""The pixel-space denoiser's taps against hooks on diffusers' own forward; counts; noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DDPM, tiny_extractor, tiny_model
from torch import Tensor

from wsiseg.config import from_mapping
from wsiseg.errors import ConfigError, ModelError
from wsiseg.geometry import Point
from wsiseg.models.base import FeatureSpec
from wsiseg.models.checkpoint import (
    load_extractor,
    load_model,
    save_checkpoint,
    save_extractor,
)
from wsiseg.models.diffusion import add_noise, place_noise
from wsiseg.models.extractors.ddpm import (
    DDPMConfig,
    DDPMExtractor,
    block_layout,
    build_denoiser,
    read_blocks,
)
from wsiseg.models.registry import build_extractor, extractor_skeleton

PLACES = [Point(0, 0), Point(32, 64)]
CONFIG = DDPMConfig(
    channels=(8, 16, 16, 24),
    layers=2,
    attention=(4,),
    head_channels=8,
    groups=4,
    taps=(0, 5, 11),
    tile_px=16,
)


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return awake(build_denoiser(CONFIG)).eval().requires_grad_(False)


def awake(net: Any) -> Any:
    """The same with random numbers in what starts as zero, as after some training."""
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def tiny(key: str = "ddpm", **changes: Any) -> DDPMExtractor:
    extractor = build_extractor({**DDPM, **changes}) if changes else tiny_extractor(key)
    assert isinstance(extractor, DDPMExtractor)
    torch.manual_seed(0)
    awake(extractor.unet)
    return extractor.eval().requires_grad_(False)


def images(count: int = 2, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def hooked(unet: Any, noised: Tensor, timestep: int) -> list[Tensor]:
    """Decoder activations that diffusers' own forward goes through, a block each."""
    places = []
    for level in unet.up_blocks:
        places.extend(getattr(level, "attentions", level.resnets))
        if level.upsamplers:
            places[-1] = level.upsamplers[0]
    found: list[Tensor] = []
    handles = [p.register_forward_hook(lambda _m, _a, out: found.append(out)) for p in places]
    unet(noised, timestep)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("timestep", [0, 250, 999])
@torch.inference_mode()
def test_taps_are_what_the_full_forward_goes_through(unet: Any, timestep: int) -> None:
    noised = images(2, 16)
    expected = hooked(unet, noised, timestep)
    found = read_blocks(unet, noised, timestep, range(12))
    assert len(found) == len(expected) == 12
    for ours, theirs, spec in zip(found, expected, block_layout(CONFIG), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.shape == (2, spec.channels, 16 // spec.stride, 16 // spec.stride)


@pytest.mark.parametrize("tap", [0, 2, 5, 11])
@torch.inference_mode()
def test_nothing_is_computed_after_the_last_tap(unet: Any, tap: int) -> None:
    ran: list[int] = []
    resnets = [r for level in unet.up_blocks for r in level.resnets]
    handles = [
        r.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, r in enumerate(resnets)
    ]
    found = read_blocks(unet, images(2, 16), 50, [tap])
    for handle in handles:
        handle.remove()
    assert ran == list(range(tap + 1))
    assert torch.equal(found[0], hooked(unet, images(2, 16), 50)[tap])


def test_published_features() -> None:
    full = extractor_skeleton({"name": "ddpm"})
    one_step = [(256, 8), (256, 4), (256, 4), (128, 2)]
    assert [tuple(s) for s in full.specs] == one_step * 3
    assert sum(s.channels for s in full.specs) == 2688
    layout = block_layout(DDPMConfig())
    assert [s.channels for s in layout] == [512] * 6 + [256] * 6 + [128] * 6
    sides = [256 // s.stride for s in layout]
    assert sides == [8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64, 128, 128, 128, 256, 256, 256, 256]


def test_number_of_parameters() -> None:
    """Dhariwal and Nichol 2021: the class-conditional 256 px model has 554 million."""
    wide = DDPMConfig(channels=(256, 256, 512, 512, 1024, 1024))
    with torch.device("meta"):
        own = sum(p.numel() for p in build_denoiser(wide).parameters())
    variance, classes = 3 * (256 * 9 + 1), 1000 * 1024
    assert round((own + variance + classes) / 1e6) == 554
    full = extractor_skeleton({"name": "ddpm"})
    assert sum(p.numel() for p in full.parameters()) == 138_285_443


def test_layout_is_guided_diffusions() -> None:
    unet: Any = extractor_skeleton({"name": "ddpm"}).unet
    for blocks in (unet.down_blocks, unet.up_blocks[::-1]):
        heads = [[a.heads for a in getattr(b, "attentions", [])][:1] for b in blocks]
        assert heads == [[], [], [], [4], [8], [8]]
    assert unet.down_blocks[0].downsamplers[0].down
    assert unet.up_blocks[0].upsamplers[0].up
    assert unet.down_blocks[0].resnets[0].time_embedding_norm == "scale_shift"


@torch.inference_mode()
def test_features_are_taps_of_the_noised_image() -> None:
    extractor = tiny()
    maps = extractor(images(), PLACES, 7)
    noise = place_noise([Point(0, 0)], 0, 0, (3, 32, 32))  # whatever the seed
    for i, t in enumerate((50, 250)):
        share = float(extractor.alphas_bar[t])
        noised = share**0.5 * images() + (1 - share) ** 0.5 * noise
        expected = hooked(extractor.unet, noised, t)
        for ours, tap in zip(maps[3 * i : 3 * i + 3], (1, 2, 4), strict=True):
            assert torch.allclose(ours, expected[tap], atol=1e-4)


@torch.inference_mode()
def test_noise_is_shared_by_all_tiles_or_their_own() -> None:
    image = images(1).repeat(2, 1, 1, 1)
    shared, own = tiny(), tiny(shared_noise=False)
    own.load_state_dict(shared.state_dict())
    a = shared(image, PLACES, 3)[-1]
    assert torch.allclose(a[0], a[1], atol=1e-5)
    assert torch.equal(shared(image, PLACES[::-1], 3)[-1], a)
    assert torch.equal(shared(image, PLACES, 4)[-1], a)
    b = own(image, PLACES, 3)[-1]
    assert float((own(image, PLACES, 4)[-1] - b).abs().max()) > 1e-2
    assert float((b[0] - b[1]).abs().max()) > 1e-2
    assert torch.allclose(own(image[1:], PLACES[1:], 3)[-1], b[1:], atol=1e-4)


@torch.inference_mode()
def test_predicted_noise_is_the_full_networks_output() -> None:
    extractor = tiny()
    steps = torch.tensor([3, 900])
    found = extractor.predict_noise(images(), steps)
    assert found.shape == (2, 3, 32, 32)
    net: Any = extractor.unet
    assert torch.equal(found, net(images(), steps).sample)
    alone = torch.cat(
        [extractor.predict_noise(images()[i : i + 1], steps[i : i + 1]) for i in (0, 1)]
    )
    assert torch.allclose(found, alone, atol=1e-5)
    last = read_blocks(net, images()[:1], 3, [5])[0]
    assert torch.allclose(found[:1], net.conv_out(net.conv_act(net.conv_norm_out(last))), atol=1e-5)


@torch.inference_mode()
def test_before_training_no_noise_is_predicted() -> None:
    fresh = build_extractor(DDPM)
    assert isinstance(fresh, DDPMExtractor)
    assert not fresh.predict_noise(images(), torch.tensor([3, 900])).any()
    net: Any = fresh.unet
    assert not any(bool(r.conv2.weight.any()) for r in net.mid_block.resnets)


def test_a_segmenter_goes_without_the_last_layers() -> None:
    extractor = tiny()
    before, maps = set(extractor.state_dict()), extractor(images(), PLACES, 0)
    extractor.drop_decoder()
    gone = {n.rpartition(".")[0] for n in before - set(extractor.state_dict())}
    assert gone == {"unet.conv_out", "unet.conv_norm_out"}
    assert all(torch.equal(a, b) for a, b in zip(maps, extractor(images(), PLACES, 0), strict=True))
    with pytest.raises(ModelError, match="ddpm: this file is for prediction"):
        extractor.predict_noise(images(), torch.tensor([3, 900]))


@torch.inference_mode()
def test_a_model_comes_back_and_its_taps_can_be_changed(tmp_path: Path) -> None:
    model, path = tiny_model("ddpm", "pixel_mlp"), tmp_path / "model.safetensors"
    awake(model.extractor)
    save_checkpoint(path, model, card={}, licence="none")
    windows, places = images(1, 96), PLACES[:1]
    loaded = load_model(path, device="cpu")
    assert torch.equal(loaded.probabilities(windows, places), model.probabilities(windows, places))
    found = load_extractor(path, device="cpu", options={"timesteps": [7], "taps": [0, 5]})
    assert [tuple(s) for s in found.specs] == [(16, 4), (8, 1)]
    assert isinstance(found, DDPMExtractor)
    own: Any = model.extractor
    noise = found.noise(PLACES, 0, 7)
    noised = add_noise(images(), noise, own.alphas_bar[7])
    for a, b in zip(
        found(images(), PLACES, 0), read_blocks(own.unet, noised, 7, [0, 5]), strict=True
    ):
        assert torch.equal(a, b)


@torch.inference_mode()
@pytest.mark.parametrize("key", ["ddpm", "genselfdiff"])
def test_a_pretrained_extractor_still_predicts_noise(key: str, tmp_path: Path) -> None:
    extractor: Any = tiny_extractor(key)
    awake(extractor)
    save_extractor(tmp_path / "e.safetensors", extractor, card={}, licence="none")
    loaded: Any = load_extractor(tmp_path / "e.safetensors", device="cpu")
    steps = torch.tensor([3, 900])
    expected = extractor.predict_noise(images(), steps)
    assert bool(expected.any())
    assert torch.equal(loaded.predict_noise(images(), steps), expected)


@pytest.mark.parametrize("taps", [(0,), (1, 2, 4), (5,)])
def test_what_can_be_trained_is_what_the_taps_need(taps: tuple[int, ...]) -> None:
    extractor = tiny(taps=taps)
    extractor.requires_grad_(True)
    sum(m.square().sum() for m in extractor(images(), PLACES, 0)).backward()  # type: ignore
    used = {n for n, p in extractor.named_parameters() if p.grad is not None}
    names = {id(p): n for n, p in extractor.named_parameters()}
    assert {names[id(p)] for p in extractor.trainable("all")} == used
    decoder = {names[id(p)] for p in extractor.trainable("decoder")}
    assert decoder == {n for n in used if n.split(".")[1] in ("mid_block", "up_blocks")}
    assert extractor.trainable("none") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": (18,)}, "taps .* from 0 to 17"),
        ({"taps": (8, 6)}, "taps .* increasing"),
        ({"taps": ()}, "taps .* at least one"),
        ({"timesteps": (1000,)}, "timesteps"),
        ({"channels": (100,)}, "channels .* multiples of groups 32"),
        ({"attention": (3,)}, "attention .* one of"),
        ({"head_channels": 48}, "head_channels 48: must divide"),
        ({"layers": 0}, "layers"),
        ({"tile_px": 100}, "tile_px 100: must be a multiple of 32"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(DDPMConfig, changes)


def test_layout_without_attention_in_the_levels() -> None:
    config = DDPMConfig(
        channels=(8, 8), layers=1, attention=(), head_channels=8, groups=8, taps=(3,)
    )
    assert (
        block_layout(config)
        == [(8, 2), (8, 1), (8, 1), (8, 1)]
        == [FeatureSpec(8, s) for s in (2, 1, 1, 1)]
    )
