"""Networks run by OpenVINO against torch: same labels, noise of the place, what is refused.

Where OpenVINO is not installed, torch's own tracer stands in for it.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wsiseg.errors import ModelError, UsageError
from wsiseg.geometry import Point
from wsiseg.inference.engine import Engine
from wsiseg.inference.runtime import to_openvino
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.models.segmenter import Segmenter

PATHSEGDIFF: dict[str, Any] = {
    "name": "pathsegdiff",
    "encoder": {"dim": 64, "depth": 1, "heads": 1, "position_px": 64},
    "first_stage": {"channels": [32, 32], "layers": 1, "codes": 16},
    "unet": {"channels": [32, 32, 64, 64], "context_dim": 24},
    "region_dim": 16,
    "timesteps": [5, 900],
    "taps": [0, 3, 12],
    "tile_px": 32,
}
DDPM: dict[str, Any] = {
    "name": "ddpm",
    "channels": [8, 16, 16],
    "layers": 1,
    "attention": [4],
    "head_channels": 8,
    "groups": 4,
    "timesteps": [50, 250],
    "taps": [1, 2, 4],
    "tile_px": 32,
}
CNN: dict[str, Any] = {"name": "cnn", "channels": [8, 8, 16, 16], "tile_px": 32}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pathsegdiff": (PATHSEGDIFF, {"name": "fcn", "widths": [8, 8, 8]}),
    "pathsegdiff, t = 0": (
        {**PATHSEGDIFF, "timesteps": [0, 900]},
        {"name": "fcn", "widths": [8, 8, 8]},
    ),
    "ddpm": (DDPM, {"name": "pixel_mlp", "members": 3, "widths": [8, 4]}),
    "cnn": (CNN, {"name": "unet", "widths": [8, 8, 8, 4]}),
}
PLACES = [Point(0, 0), Point(64, 32), Point(96, 32)]


def model(name: str) -> Segmenter:
    torch.manual_seed(0)
    extractor, head = MODELS[name]
    classes = [
        {"name": "rest", "color": [0, 0, 200], "background": True},
        {"name": "gland", "color": [200, 0, 0]},
    ]
    config = ModelConfig(extractor=extractor, head=head, classes=classes, window_px=96)
    return build_segmenter(config).eval()


class Compiled:
    """What the stand-in compiles to; like OpenVINO's, it runs for one caller at a time."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self._free = threading.Lock()
        self.outputs: list[None] = []

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        if not self._free.acquire(blocking=False):
            raise RuntimeError("Infer Request is busy")
        try:
            with torch.no_grad():
                found = self._network(*map(torch.from_numpy, inputs))
        finally:
            self._free.release()
        found = (found,) if isinstance(found, torch.Tensor) else found
        self.outputs = [None] * len(found)
        return [m.numpy() for m in found]


@pytest.fixture(params=["openvino", "tracer"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "openvino":
        if importlib.util.find_spec("openvino") is None:
            pytest.skip("OpenVINO is not installed")
        return
    core = SimpleNamespace(compile_model=lambda model, device, options: Compiled(model))

    def convert_model(network: Any, *, example_input: Any, input: Any) -> Any:
        assert [tuple(t.shape) for t in example_input] == input
        return torch.jit.trace(network, example_input, check_trace=False)

    fake = SimpleNamespace(Core=lambda: core, convert_model=convert_model)
    monkeypatch.setitem(sys.modules, "openvino", fake)


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("library", "four_threads")
@pytest.mark.parametrize("name", list(MODELS))
def test_labels_and_features_are_those_of_torch(name: str) -> None:
    plain = model(name)
    fast = to_openvino(plain, precision="fp32")
    tiles = np.random.default_rng(0).integers(0, 256, (27, 32, 32, 3), np.uint8)
    spots = [Point(32 * (i % 3), 32 * (i // 3)) for i in range(27)]
    ours, theirs = Engine(fast, precision="fp32", seed=3), Engine(plain, precision="fp32", seed=3)
    assert (ours.runtime, theirs.runtime) == ("openvino", "torch")
    first, second = ours.encode(tiles, spots), theirs.encode(tiles, spots)
    for a, b in zip(first, second, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())
    windows = [tuple(m.unflatten(0, (3, 3, 3)) for m in maps) for maps in (first, second)]
    found, wanted = (
        engine.classify(maps, PLACES) for engine, maps in zip((ours, theirs), windows, strict=True)
    )
    assert found.shape == wanted.shape == (3, 2, 96, 96)
    assert float((found - wanted).abs().max()) < 1e-3
    assert float((found.argmax(1) == wanted.argmax(1)).float().mean()) >= 0.999


@pytest.mark.usefixtures("library")
def test_noise_is_that_of_the_place_and_the_seed() -> None:
    fast = to_openvino(model("pathsegdiff"), precision="fp32")
    tile = torch.zeros(1, 3, 32, 32)
    maps = [
        fast.tile_features(tile, [place], seed)[-1]
        for place, seed in ((Point(0, 0), 0), (Point(64, 0), 0), (Point(0, 0), 1), (Point(0, 0), 0))
    ]
    assert torch.equal(maps[0], maps[3])
    assert not torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="not in fp16"):
        to_openvino(model("cnn"), precision="fp16")
    with pytest.raises(UsageError, match="not on meta"):
        to_openvino(model("cnn").to("meta"), precision="fp32")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"pip install 'wsiseg\[openvino\]'"):
        to_openvino(model("cnn"), precision="fp32")


def test_a_model_that_cannot_be_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert_model(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no such operator\nand a long story")

    fake = SimpleNamespace(Core=SimpleNamespace, convert_model=convert_model)
    monkeypatch.setitem(sys.modules, "openvino", fake)
    with pytest.raises(ModelError, match=r"cannot take it \(no such operator\)") as error:
        to_openvino(model("cnn"), precision="fp32")
    assert "\n" not in str(error.value)
