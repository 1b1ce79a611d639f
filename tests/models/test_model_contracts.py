"""What every extractor and every head of the tables must do, on tiny networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CLASSES, DDPM, EXTRACTORS, HEADS, PATHSEGDIFF, tiny_extractor, tiny_model

from wsiseg.config import from_mapping, to_mapping
from wsiseg.errors import ConfigError
from wsiseg.geometry import Point
from wsiseg.inference.engine import Engine
from wsiseg.models import registry
from wsiseg.models.base import Features
from wsiseg.models.diffusion import place_noise
from wsiseg.models.extractors import pathsegdiff
from wsiseg.models.registry import (
    ModelConfig,
    build_segmenter,
    extractor_mapping,
    extractor_skeleton,
    with_options,
)

PLACES = [Point(0, 0), Point(32, 0), Point(64, 96)]


def tiles(count: int, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_every_line_of_the_tables_is_tested() -> None:
    assert {e["name"] for e in EXTRACTORS.values()} == set(registry.EXTRACTORS)
    assert {h["name"] for h in HEADS.values()} == set(registry.HEADS)


@pytest.mark.parametrize("key", EXTRACTORS)
class TestExtractors:
    @torch.inference_mode()
    def test_outputs_fit_the_specs(self, key: str) -> None:
        extractor = tiny_extractor(key)
        maps = extractor(tiles(3), PLACES, 0)
        assert len(maps) == len(extractor.specs)
        for found, spec in zip(maps, extractor.specs, strict=True):
            side = extractor.tile_px // spec.stride
            assert found.shape == (3, spec.channels, side, side)
            assert bool(torch.isfinite(found).all())

    @torch.inference_mode()
    def test_the_same_input_gives_the_same_output(self, key: str) -> None:
        extractor = tiny_extractor(key)
        for a, b in zip(
            extractor(tiles(3), PLACES, 4), extractor(tiles(3), PLACES, 4), strict=True
        ):
            assert torch.equal(a, b)

    @torch.inference_mode()
    def test_tiles_do_not_depend_on_their_batch(self, key: str) -> None:
        extractor = tiny_extractor(key)
        together = extractor(tiles(3), PLACES, 4)
        for i, place in enumerate(PLACES):
            alone = extractor(tiles(3)[i : i + 1], [place], 4)
            for a, b in zip(together, alone, strict=True):
                assert float((a[i : i + 1] - b).abs().max()) <= 1e-4 * float(b.abs().max())

    @torch.inference_mode()
    def test_the_configuration_goes_there_and_back(self, key: str) -> None:
        extractor = tiny_extractor(key)
        assert extractor_mapping(extractor_skeleton(extractor_mapping(extractor))) == (
            extractor_mapping(extractor)
        )

    @torch.inference_mode()
    def test_without_memory_the_tensors_have_the_same_shapes(self, key: str) -> None:
        real, skeleton = tiny_extractor(key).state_dict(), extractor_skeleton(EXTRACTORS[key])
        shapes = {n: t.shape for n, t in skeleton.state_dict().items()}
        assert shapes == {n: t.shape for n, t in real.items()}
        assert all(t.is_meta for t in skeleton.state_dict().values())


PAIRS = [(e, "threshold" if e == "stain" else "fcn") for e in EXTRACTORS] + [("stain", "fcn")]
PAIRS += [("cnn", "unet"), ("cnn, VGG", "fcn8"), ("stain", "linear")]
PAIRS += [("genselfdiff", "linear"), ("ddpm", "pixel_mlp"), ("pathsegdiff", "pixel_mlp")]


@pytest.mark.parametrize("key", EXTRACTORS)
def test_tiles_may_be_computed_side_by_side(key: str) -> None:
    engine = Engine(tiny_model(key), precision="fp32")
    side, before = engine.segmenter.info.tile_px, torch.get_num_threads()
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (side, side, 3), np.uint8) for _ in range(12)]
    places = [Point(i * side, 0) for i in range(12)]
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(engine.encode(pixels, places))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("extractor", "head"), PAIRS)
class TestHeads:
    @torch.inference_mode()
    def test_logits_cover_the_window(self, extractor: str, head: str) -> None:
        model = tiny_model(extractor, head)
        features = model.features(tiles(2, 96), PLACES[:2], 0)
        assert model.window_logits(features).shape == (2, 2, 96, 96)
        wide: Features = tuple(f[:, :1] for f in features)
        assert model.window_logits(wide).shape == (2, 2, 32, 96)

    @torch.inference_mode()
    def test_probabilities_sum_to_one(self, extractor: str, head: str) -> None:
        found = tiny_model(extractor, head).probabilities(tiles(2, 96), PLACES[:2])
        assert found.dtype == torch.float32
        assert torch.allclose(found.sum(1), torch.ones(2, 96, 96), atol=1e-5)

    @torch.inference_mode()
    def test_windows_do_not_depend_on_their_batch(self, extractor: str, head: str) -> None:
        model = tiny_model(extractor, head)
        together = model.probabilities(tiles(2, 96), PLACES[:2])
        alone = model.probabilities(tiles(2, 96)[1:], PLACES[1:2])
        assert torch.allclose(together[1:], alone, atol=1e-4)


@torch.inference_mode()
def test_noise_reaches_the_features_by_place_and_seed_alone() -> None:
    extractor = tiny_extractor()
    image = tiles(1)
    same = extractor(image.repeat(2, 1, 1, 1), [Point(0, 0), Point(0, 0)], 3)
    moved = extractor(image.repeat(2, 1, 1, 1), [Point(0, 0), Point(32, 0)], 3)
    other = extractor(image, [Point(0, 0)], 4)
    assert torch.allclose(same[-1][0], same[-1][1], atol=1e-5)
    assert float((moved[-1][0] - moved[-1][1]).abs().max()) > 1e-2
    assert float((same[-1][:1] - other[-1]).abs().max()) > 1e-2


@torch.inference_mode()
@pytest.mark.parametrize("mapping", [PATHSEGDIFF, {**DDPM, "shared_noise": False}])
def test_at_step_0_features_depend_on_no_place_and_no_seed(mapping: dict[str, Any]) -> None:
    extractor = registry.build_extractor({**mapping, "timesteps": [0]}).eval()
    found = extractor(tiles(1), [Point(0, 0)], 3)
    for place, seed in ((Point(32, 0), 3), (Point(0, 0), 4)):
        other = extractor(tiles(1), [place], seed)
        assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))


@torch.inference_mode()
def test_noise_has_its_strength_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor: Any = registry.build_extractor({**PATHSEGDIFF, "timesteps": [0, 5, 50]}).eval()
    seen: list[torch.Tensor] = []
    blank = torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16)
    monkeypatch.setattr(pathsegdiff, "encode_with_details", lambda *_: (blank, ()))
    monkeypatch.setattr(pathsegdiff, "read_taps", lambda _, noised, *__: seen.append(noised) or [])
    extractor.bfloat16()(tiles(1).bfloat16(), [Point(0, 0)], 3)
    assert {s.dtype for s in seen} == {torch.bfloat16}
    for noised, t in zip(seen, (0, 5, 50), strict=True):
        noise = place_noise([Point(0, 0)], 3, t, (3, 16, 16))
        share = (1 - float(extractor.alphas_bar[t])) ** 0.5 if t else 0.0
        assert float(noised.float().norm() / noise.norm()) == pytest.approx(share, rel=3e-3)


@torch.inference_mode()
def test_several_timesteps_concatenate() -> None:
    both = tiny_extractor("pathsegdiff, steps and taps")
    images, places = tiles(2), PLACES[:2]
    maps = both(images, places, 0)
    for start, timestep in ((0, 5), (3, 900)):
        single = registry.build_extractor(
            {**PATHSEGDIFF, "timesteps": [timestep], "taps": [0, 3, 12]}
        ).eval()
        single.load_state_dict(both.state_dict())
        for a, b in zip(maps[start : start + 3], single(images, places, 0), strict=True):
            assert torch.equal(a, b)


@torch.inference_mode()
def test_stain_threshold_finds_dark_nuclei() -> None:
    model = tiny_model("stain", "threshold")
    image = torch.ones(1, 3, 96, 96)
    nuclei = torch.tensor([70.0, 40.0, 130.0]) / 127.5 - 1
    image[:, :, 32:64, 32:64] = nuclei[:, None, None]
    found = model.probabilities(image, [Point(0, 0)])[0].argmax(0)
    assert int(found[48, 48]) == 1
    assert int(found[5, 5]) == 0


def model_mapping(**changes: Any) -> dict[str, Any]:
    base = {
        "extractor": PATHSEGDIFF,
        "head": {"name": "fcn"},
        "classes": CLASSES,
        "window_px": 96,
    }
    return {**base, **changes}


def test_model_config_is_completed_and_goes_there_and_back() -> None:
    config = from_mapping(ModelConfig, model_mapping())
    plain = to_mapping(config)
    assert plain["extractor"]["timesteps"] == [50]
    assert plain["classes"][1] == {
        "value": 2,
        "name": "Gland",
        "color": [200, 0, 0],
        "background": False,
    }
    assert from_mapping(ModelConfig, plain) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mpp": 0.0}, "mpp 0.0: must be from"),
        ({"mpp": float("nan")}, "mpp: nan is no number"),
        ({"mpp": 5000.0}, r"mpp 5000\.0: must be from"),
        ({"window_px": 100}, "window_px 100: must be a multiple of the tile, 32"),
        ({"window_px": 0}, "window_px 0"),
        ({"input": "rgb/255"}, "input: 'rgb/255' is not one of"),
        ({"extractor": {"name": "vgg"}}, r"extractor\.name: 'vgg' is not one of pathsegdiff"),
        ({"extractor": {}}, "extractor: must be a mapping with a name"),
        ({"extractor": {**PATHSEGDIFF, "width": 3}}, r"unknown key extractor\.width"),
        ({"extractor": {**PATHSEGDIFF, "taps": [13]}}, "taps"),
        ({"extractor": {**PATHSEGDIFF, "timesteps": [1000]}}, "timesteps"),
        ({"head": {"name": "fcn", "widths": [1, 2]}}, r"head\.widths"),
        ({"classes": []}, "0 classes"),
        ({"classes": [{"name": "a:b", "color": [0, 0, 0]}]}, "class name"),
        ({"classes": [{"name": "a", "color": [0, 0, 300]}]}, "colour of class"),
        ({"classes": 3}, "classes: each needs a name"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(ModelConfig, model_mapping(**changes))


def test_heads_that_do_not_fit_are_refused() -> None:
    threshold = {"name": "threshold"}
    with pytest.raises(ConfigError, match="head threshold: needs"):
        build_segmenter(ModelConfig(**model_mapping(head=threshold)))
    three = [*CLASSES, {"name": "Nerve", "color": [0, 0, 9]}]
    with pytest.raises(ConfigError, match="head threshold: needs"):
        tiny_model("stain", "threshold", classes=three)


def test_another_extractor_than_the_configuration_says() -> None:
    config = ModelConfig(**model_mapping())
    with pytest.raises(ConfigError, match="is not of the model's configuration"):
        build_segmenter(config, extractor=tiny_extractor("pathsegdiff, null"))
    assert build_segmenter(config, extractor=tiny_extractor()).info.mpp == 0.5


def test_only_options_can_be_changed_without_other_weights() -> None:
    assert with_options(PATHSEGDIFF, {"taps": [4]})["taps"] == [4]
    with pytest.raises(ConfigError, match=r"extractor\.unet: cannot be changed .* timesteps, taps"):
        with_options(PATHSEGDIFF, {"unet": {}})
