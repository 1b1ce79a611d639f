"""A segmenter whose networks OpenVINO runs on the CPU. Knows no slides and no blending.

The networks are traced as they are, one tile and one window at a time, which is how they are run on
a CPU anyway. What torch computes around them stays: cutting, softmax, views. Noise belongs to the
place of a tile, so it is no part of the traced network but one of its inputs.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wsiseg.errors import ModelError, UsageError
from wsiseg.geometry import Point
from wsiseg.models.base import FeatureExtractor, Features, Head
from wsiseg.models.diffusion import place_noise, supplied_noise
from wsiseg.models.segmenter import Segmenter

HINTS = {"fp32": "f32", "bf16": "bf16"}
Shape = tuple[int, int, int]
Run = Callable[..., Features]
Compile = Callable[[nn.Module, tuple[Tensor, ...]], Run]


def to_openvino(segmenter: Segmenter, *, precision: str) -> Segmenter:
    """The segmenter with its extractor and its head compiled by OpenVINO.

    Compiling takes from seconds to a minute. As many threads are used as torch has then. Where a
    head can tell how unsure it is, the compiled one cannot.

    Args:
        segmenter: on the CPU.
        precision: "fp32" or "bf16"; a processor without bf16 computes in float32.

    Raises:
        UsageError: OpenVINO is not installed, or does not run on that device or at that precision.
        ModelError: OpenVINO cannot take the model.
    """
    if segmenter.device.type != "cpu":
        raise UsageError(f"openvino runs on the CPU, not on {segmenter.device}; give --device cpu")
    if precision not in HINTS:
        raise UsageError(f"openvino computes in fp32 or bf16, not in {precision}")
    compiled = _compiler(find_openvino(), HINTS[precision])
    info = segmenter.eval().info
    side = info.window_px // info.tile_px
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")  # of the tracer: shapes become constants, as wanted
            extractor = CompiledExtractor(segmenter.extractor, compiled)
            tile = torch.zeros(1, 3, info.tile_px, info.tile_px)
            maps = extractor(tile, [Point(0, 0)], 0)
            window = tuple(m[:, None, None].repeat(1, side, side, 1, 1, 1) for m in maps)
            head = CompiledHead(segmenter.head, compiled, window)
    except (RuntimeError, TypeError, ValueError) as e:
        line = (str(e).splitlines() or [type(e).__name__])[0]
        raise ModelError(
            f"model {info.name}: openvino cannot take it ({line[:160]}); give --runtime torch"
        ) from e
    return Segmenter(extractor, head, info).eval()


def find_openvino() -> Any:
    """The library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module("openvino")
    except ImportError as e:
        raise UsageError("openvino is not installed; pip install 'wsiseg[openvino]'") from e


def _compiler(library: Any, hint: str) -> Compile:
    """What compiles a network for inputs of the shapes it is given."""
    core = library.Core()
    options = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }

    def compiled(network: nn.Module, inputs: tuple[Tensor, ...]) -> Run:
        shapes = [tuple(t.shape) for t in inputs]
        model = library.convert_model(network, example_input=inputs, input=shapes)
        ready = core.compile_model(model, "CPU", options)

        def run(*values: Tensor) -> Features:
            found = ready([v.float().contiguous().numpy() for v in values])
            return tuple(torch.from_numpy(found[i]) for i in range(len(ready.outputs)))

        return run

    return compiled


class _Draw(NamedTuple):
    """Noise that an extractor draws for a tile; place and seed are None where they are given."""

    place: Point | None
    seed: int | None
    timestep: int
    shape: Shape

    def noise(self, place: Point, seed: int) -> Tensor:
        """(1, C, h, w) noise for a tile at `place` in a run of `seed`."""
        at = place if self.place is None else self.place
        of = seed if self.seed is None else self.seed
        return place_noise([at], of, self.timestep, self.shape)


class CompiledExtractor(FeatureExtractor):
    """An extractor that is compiled; tiles are computed one by one."""

    def __init__(self, source: FeatureExtractor, compiled: Compile) -> None:
        """Raises what OpenVINO raises where it cannot take the network."""
        super().__init__()
        self.specs, self.tile_px = source.specs, source.tile_px
        tile = torch.zeros(1, 3, self.tile_px, self.tile_px)
        self._draws = _draws(source, tile)
        noise = tuple(torch.zeros(1, *draw.shape) for draw in self._draws)
        self._run = compiled(_WithNoise(source), (tile, *noise))

    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        """See `FeatureExtractor.forward`."""
        parts = []
        for image, place in zip(images, places, strict=True):
            noise = [draw.noise(place, seed) for draw in self._draws]
            parts.append(self._run(image[None], *noise))
        return tuple(torch.cat(maps) for maps in zip(*parts, strict=True))


class CompiledHead(Head):
    """A head that is compiled; windows are computed one by one."""

    def __init__(self, source: Head, compiled: Compile, window: Features) -> None:
        """For windows of the shapes of `window`; raises what OpenVINO raises."""
        super().__init__()
        self.class_count = source.class_count
        self._run = compiled(_Spread(source), tuple(window))

    def forward(self, features: Features) -> Tensor:
        """See `Head.forward`."""
        maps = tuple(features)
        windows = range(len(maps[0]))
        return torch.cat([self._run(*(m[i : i + 1] for m in maps))[0] for i in windows])


class _WithNoise(nn.Module):
    """An extractor as a function of a tile and of all noise that it draws, in order."""

    def __init__(self, source: FeatureExtractor) -> None:
        super().__init__()
        self.source = source

    def forward(self, tile: Tensor, *noise: Tensor) -> Features:
        left = iter(noise)
        with supplied_noise(lambda *_: next(left)):
            features: Features = self.source(tile, [Point(0, 0)], 0)
        return features


class _Spread(nn.Module):
    """A head as a function of its maps, each an argument."""

    def __init__(self, source: Head) -> None:
        super().__init__()
        self.source = source

    def forward(self, *maps: Tensor) -> Tensor:
        logits: Tensor = self.source(maps)
        return logits


def _draws(source: FeatureExtractor, tile: Tensor) -> list[_Draw]:
    """All noise that an extractor draws for a tile, in order."""
    found: list[_Draw] = []
    place, seed = Point(-1, -1), -1  # of no tile and no run: seen where they arrive

    def supply(places: Sequence[Point], of: int, timestep: int, shape: Shape) -> Tensor:
        (at,) = places
        own = (None if at == place else at, None if of == seed else of)
        found.append(_Draw(*own, timestep, shape))
        return torch.zeros(1, *shape)

    with supplied_noise(supply):
        source(tile, [place], seed)
    return found
