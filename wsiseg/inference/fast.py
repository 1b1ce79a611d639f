"""A diffusion extractor made fast for GPUs: half precision, fused blocks, graphs. Knows no slides.

Weights are kept in the half type, channels side by side in memory, blocks fused and what they add
at each timestep computed once (`models/extractors/fused_blocks.py`). From the second batch of a
size on the launches of all kernels are replayed as one CUDA graph; smaller batches after that are
filled up, so that a tile is computed in the same way in all of them. Noise belongs to the place of
a tile, so it is no part of the graph but one of its inputs, and is drawn on the host while the
device works.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from wsiseg.geometry import Point
from wsiseg.inference.memory import lacks_memory
from wsiseg.models.base import FeatureExtractor, Features
from wsiseg.models.diffusion import place_noise, supplied_noise
from wsiseg.models.extractors.fused_blocks import fold_times, fuse
from wsiseg.models.extractors.pathsegdiff import PathSegDiffExtractor
from wsiseg.models.fused import channels_last
from wsiseg.models.segmenter import Segmenter

_State = tuple[torch.device, int]
_MADE: WeakKeyDictionary[FeatureExtractor, dict[torch.dtype, tuple[_State, FastExtractor]]] = (
    WeakKeyDictionary()
)


def to_fast(segmenter: Segmenter, dtype: torch.dtype) -> Segmenter:
    """The segmenter with a fast extractor; as it is, where there is none for its extractor.

    The fast extractor is kept as long as the extractor, and made anew where that has moved to
    another device or its weights were changed since.

    Args:
        segmenter: on the device where it is to run.
        dtype: half precision.
    """
    source = segmenter.extractor
    if not isinstance(source, PathSegDiffExtractor) or dtype == torch.float32:
        return segmenter
    made, state = _MADE.setdefault(source, {}), _state(source)
    if dtype in made and made[dtype][0] != state:
        del made[dtype]
    if dtype not in made:
        made[dtype] = state, FastExtractor(source, dtype)
    return Segmenter(made[dtype][1], segmenter.head, segmenter.info).eval()


def _state(source: FeatureExtractor) -> _State:
    """What changes where weights move to another device or are changed in place."""
    weights = list(source.parameters())
    return weights[0].device, sum(0 if w.is_inference() else w._version for w in weights)


class FastExtractor(FeatureExtractor):
    """A PathSegDiff extractor whose features are in half precision.

    Attributes:
        network: the extractor that is run.
        graphs: whether work is captured and replayed; only on CUDA devices.
    """

    def __init__(self, source: PathSegDiffExtractor, dtype: torch.dtype) -> None:
        """A copy of `source`, which stays as it is."""
        super().__init__()
        self.specs, self.tile_px = source.specs, source.tile_px
        network = copy.deepcopy(source).eval().requires_grad_(False).to(dtype)
        network.drop_decoder()
        fuse(network)
        fold_times(network.unet, network.config.timesteps)
        device = next(network.parameters()).device
        network.alphas_bar = network.alphas_bar.to(device)
        self.network, self.graphs = network, device.type == "cuda"
        self._dtype, self._device = dtype, device
        self._last = 0
        self._graph: _Graph | None = None
        self._too_large: float = float("inf")

    def noise(self, places: Sequence[Point], seed: int) -> tuple[Tensor, ...]:
        """(B, C, h, w) float32 noise of the places on the device, one tensor a timestep after 0."""
        config = self.network.config
        side = config.tile_px // config.first_stage.factor
        shape = (config.first_stage.latent_channels, side, side)
        drawn = [place_noise(places, seed, t, shape) for t in config.timesteps if t]
        if self._device.type != "cuda":
            return tuple(drawn)
        return tuple(n.pin_memory().to(self._device, non_blocking=True) for n in drawn)

    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        """See `FeatureExtractor.forward`; where memory is short, the graph is given up first."""
        try:
            return self._features(images, places, seed)
        except RuntimeError as e:
            if lacks_memory(e):
                self._graph = None  # for all of its size, which the parts of a batch do not need
            raise

    def _features(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        inputs = (channels_last(images.to(self._dtype)), *self.noise(places, seed))
        count, repeated = len(images), len(images) == self._last
        self._last = count
        missing = self._graph is None or count > self._graph.size
        if self.graphs and repeated and missing and count < self._too_large:
            self._capture(inputs)
        if self._graph is None or count > self._graph.size:
            return self.compute(*inputs)
        return self._graph(inputs)

    def compute(self, images: Tensor, *noise: Tensor) -> Features:
        """Features of channels_last images in the half type, with the noise that `noise` gives."""
        left = iter(noise)
        with (
            torch.autocast(images.device.type, enabled=False),
            supplied_noise(lambda *_: next(left)),
        ):
            found: Features = self.network(images, [Point(0, 0)] * len(images), 0)
        return found

    def _capture(self, inputs: Features) -> None:
        """Capture a graph for batches of that size; where memory is short, for none as large."""
        self._graph = None
        try:
            self._graph = _Graph(self, inputs)
            return
        except RuntimeError as e:
            causes = (e, e.__context__)  # the end of a failed capture may have an error of its own
            if not any(lacks_memory(cause) for cause in causes if cause is not None):
                raise
        self._too_large = len(inputs[0])
        torch.cuda.empty_cache()  # here, where no error holds tensors any more


class _Graph:
    """The kernels of a batch of one size, captured."""

    def __init__(self, extractor: FastExtractor, inputs: Features) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.size = len(inputs[0])
        self._inputs = tuple(t.clone() for t in inputs)
        self._graph = torch.cuda.CUDAGraph()
        before = torch.cuda.stream(torch.cuda.current_stream())  # a failed capture leaves another
        with before, torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = extractor.compute(*self._inputs)

    def __call__(self, inputs: Features) -> Features:
        count = len(inputs[0])
        for place, value in zip(self._inputs, inputs, strict=True):
            place[:count].copy_(value)
        self._graph.replay()
        return tuple(m[:count].clone() for m in self._outputs)
