"""The fast extractor: labels, noise, one copy a model, batches filled up once there is a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_runtime import model

from wsiseg.geometry import Point
from wsiseg.inference import fast
from wsiseg.inference.engine import Engine
from wsiseg.inference.fast import FastExtractor, to_fast
from wsiseg.inference.memory import Parts

SPOTS = [Point(32 * (i % 3), 32 * (i // 3)) for i in range(9)]


def tiles(count: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1


def test_labels_are_those_of_float32() -> None:
    plain = model("pathsegdiff")
    quick = to_fast(plain, torch.bfloat16)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    found = []
    for segmenter, precision in ((plain, "fp32"), (quick, "bf16")):
        engine = Engine(segmenter, precision=precision, seed=3)
        maps = tuple(m.unflatten(0, (1, 3, 3)) for m in engine.encode(pixels, SPOTS))
        found.append(engine.classify(maps, SPOTS[:1]).argmax(1))
    assert float((found[0] == found[1]).float().mean()) > 0.98
    assert next(plain.extractor.parameters()).dtype == torch.float32, "the source stays as it is"


def test_features_are_half_and_noise_is_that_of_place_and_seed() -> None:
    quick = FastExtractor(model("pathsegdiff").extractor, torch.bfloat16)  # type: ignore[arg-type]
    with torch.inference_mode():
        same, again = quick(tiles(), SPOTS, 0), quick(tiles(), SPOTS, 0)
        other, moved = quick(tiles(), SPOTS, 1), quick(tiles(), SPOTS[::-1], 0)
    assert {m.dtype for m in same} == {torch.bfloat16}
    steps: Any = quick.network.config.timesteps
    assert getattr(quick.network.unet, "folded_times") == tuple(steps), "what time adds is folded"  # noqa: B009
    assert [m.shape[1] for m in same] == [s.channels for s in quick.specs]
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in same)
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert not torch.equal(same[0], other[0])
    assert not torch.equal(same[0], moved[0])
    assert torch.equal(same[0][4], moved[0][4])


def test_at_step_0_there_is_no_noise() -> None:
    extractor: Any = model("pathsegdiff, t = 0").extractor
    quick = FastExtractor(extractor, torch.bfloat16)
    assert [n.shape for n in quick.noise(SPOTS, 0)] == [(9, 3, 16, 16)], "of step 900 alone"
    with torch.inference_mode():
        first, moved = quick(tiles(), SPOTS, 0), quick(tiles(), SPOTS[::-1], 1)
        plain = extractor(tiles(), SPOTS, 0)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], moved[:3], strict=True))
    assert not torch.equal(first[3], moved[3])
    for a, b in zip(first, plain, strict=True):
        assert float((a - b).norm()) <= 5e-2 * float(b.norm())


def test_one_copy_a_model_and_none_where_there_is_no_fast_one() -> None:
    plain = model("pathsegdiff")
    first, second = to_fast(plain, torch.bfloat16), to_fast(plain, torch.bfloat16)
    assert first.extractor is second.extractor
    assert first.head is plain.head
    assert to_fast(plain, torch.float16).extractor is not first.extractor
    assert to_fast(plain, torch.float32) is plain
    other = model("cnn")
    assert to_fast(other, torch.bfloat16) is other


def test_the_copy_is_made_anew_where_weights_were_changed() -> None:
    plain = model("pathsegdiff")
    first = to_fast(plain, torch.bfloat16).extractor
    with torch.no_grad():
        for weights in plain.extractor.parameters():
            weights.mul_(1.1)
    second = to_fast(plain, torch.bfloat16).extractor
    assert second is not first
    assert to_fast(plain, torch.bfloat16).extractor is second
    with torch.inference_mode():
        assert not torch.equal(first(tiles(1), SPOTS[:1], 0)[0], second(tiles(1), SPOTS[:1], 0)[0])


class FakeGraph:
    """Computes what it was captured for, all of it, as a graph does."""

    def __init__(self, extractor: FastExtractor, inputs: Any) -> None:
        self.size = len(inputs[0])
        self._inputs = [t.clone() for t in inputs]
        self._extractor = extractor
        self.replayed: list[int] = []

    def __call__(self, inputs: Any) -> Any:
        count = len(inputs[0])
        self.replayed.append(count)
        for place, value in zip(self._inputs, inputs, strict=True):
            place[:count].copy_(value)
        return tuple(m[:count].clone() for m in self._extractor.compute(*self._inputs))


def test_batches_are_replayed_and_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    quick: Any = FastExtractor(model("pathsegdiff").extractor, torch.bfloat16)  # type: ignore[arg-type]
    monkeypatch.setattr(fast, "_Graph", FakeGraph)
    quick.graphs = True
    with torch.inference_mode():
        expected = quick.compute(tiles().bfloat16(), *quick.noise(SPOTS, 0))
        quick(tiles(4), SPOTS[:4], 0)
        assert quick._graph is None, "nothing is captured for a size seen once"
        quick(tiles(6), SPOTS[:6], 0)
        quick(tiles(6), SPOTS[:6], 0)
        quick(tiles(3), SPOTS[:3], 0)
        assert quick._graph.replayed == [6, 3]
        quick(tiles(9), SPOTS, 0)
        assert quick._graph.size == 6, "a larger batch that comes once is computed as it is"
        found = quick(tiles(9), SPOTS, 0)
        assert quick._graph.size == 9
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).float().norm()) <= 1e-2 * float(b.float().norm())


def graphed(monkeypatch: pytest.MonkeyPatch, graph: Any) -> Any:
    """A fast extractor with something else for graphs."""
    quick: Any = FastExtractor(model("pathsegdiff").extractor, torch.bfloat16)  # type: ignore[arg-type]
    monkeypatch.setattr(fast, "_Graph", graph)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    quick.graphs = True
    return quick


def end_of_capture() -> None:
    """What is raised where memory ends inside of a capture."""
    try:
        raise torch.OutOfMemoryError("too little")
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def no_library_memory() -> None:
    raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")


@pytest.mark.parametrize("fail", [end_of_capture, no_library_memory])
def test_where_memory_is_short_there_are_graphs_of_what_is_smaller(
    monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None]
) -> None:
    tried: list[int] = []

    def small(extractor: FastExtractor, inputs: Any) -> FakeGraph:
        tried.append(len(inputs[0]))
        if len(inputs[0]) > 3:
            fail()
        return FakeGraph(extractor, inputs)

    quick = graphed(monkeypatch, small)
    with torch.inference_mode():
        first, second, _ = (quick(tiles(4), SPOTS[:4], 0) for _ in range(3))
        assert quick._graph is None
        assert torch.equal(first[0], second[0])
        for count in (3, 3, 6, 6):
            quick(tiles(count), SPOTS[:count], 0)
    assert quick._graph.size == 3
    assert tried == [4, 3], "what does not fit is tried once"


def test_another_error_of_a_capture_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    quick = graphed(monkeypatch, bad)
    with torch.inference_mode():
        quick(tiles(4), SPOTS[:4], 0)
        with pytest.raises(RuntimeError, match="illegal"):
            quick(tiles(4), SPOTS[:4], 0)


def test_halved_batches_have_graphs_of_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    room = [9]

    class Tight(FakeGraph):
        def __call__(self, inputs: Any) -> Any:
            if self.size > room[0]:
                raise torch.OutOfMemoryError("too little")
            return super().__call__(inputs)

    quick, parts = graphed(monkeypatch, Tight), Parts(torch.device("cpu"), together=True)

    def encode() -> list[int]:
        found = parts.run("tiles", 8, lambda a, b: quick(tiles(8)[a:b], SPOTS[a:b], 0))
        return [len(maps[0]) for maps in found]

    with torch.inference_mode():
        encode()
        assert encode() == [8]
        assert quick._graph.size == 8
        room[0] = 4
        with pytest.warns(UserWarning, match="out of memory with 8 tiles"):
            assert encode() == [4, 4]
        assert quick._graph.size == 4
        assert encode() == [4, 4]
    assert quick._graph.replayed == [4, 4, 4]
