"""Tiles side by side: order, errors, the number of threads, the same bits with any of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from wsiseg.geometry import Point
from wsiseg.inference import side_by_side as module
from wsiseg.inference.engine import Engine
from wsiseg.inference.side_by_side import MOST, side_by_side
from wsiseg.models.checkpoint import load_model


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_are_in_order_and_threads_are_given_back(threads: int) -> None:
    seen: set[int] = set()

    def work(i: int) -> int:
        seen.add(torch.get_num_threads())
        time.sleep(0.002 * (7 - i))
        return i * i

    assert side_by_side(8, work) == [i * i for i in range(8)]
    assert seen == {2 if threads == 8 else 1}
    assert torch.get_num_threads() == threads
    assert side_by_side(0, work) == []


def test_several_are_under_way_at_a_time() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        barrier = threading.Barrier(3, timeout=10)
        assert len(side_by_side(3, lambda i: barrier.wait())) == 3
    finally:
        torch.set_num_threads(before)


def test_the_first_error_is_raised_and_nothing_else_begun(threads: int) -> None:
    begun: list[int] = []

    def work(i: int) -> int:
        begun.append(i)
        if i == 1:
            raise ValueError("one")
        time.sleep(0.05)
        return i

    with pytest.raises(ValueError, match="one"):
        side_by_side(40, work)
    assert len(begun) <= 1 + MOST
    assert torch.get_num_threads() == threads
    assert side_by_side(2, lambda i: i) == [0, 1]


@pytest.mark.skipif(os.name != "posix", reason="no signal ends a wait here")
def test_after_an_interruption_nothing_else_is_begun() -> None:
    begun: list[int] = []

    def work(i: int) -> None:
        begun.append(i)
        time.sleep(0.1)
        if i == 1:  # when all have been handed out
            os.kill(os.getpid(), signal.SIGINT)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            side_by_side(40, work)
        time.sleep(1)
        assert len(begun) <= 1 + MOST
        assert side_by_side(2, lambda i: i) == [0, 1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bits_do_not_depend_on_how_many_there_are(precision: str) -> None:
    engine = Engine(load_model("glas-small", device="cpu"), precision=precision)
    side, before = engine.segmenter.info.tile_px, torch.get_num_threads()
    rng = np.random.default_rng(0)
    tiles = [rng.integers(0, 256, (side, side, 3), np.uint8) for _ in range(3)]
    places = [Point(i * side, 0) for i in range(3)]
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(engine.encode(tiles, places))
            found.append(engine.encode(tiles[:1], places[:1]))
    finally:
        torch.set_num_threads(before)
    for maps in found[1:]:
        assert all(torch.equal(a[: len(b)], b) for a, b in zip(found[0], maps, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
def test_a_forked_process_has_threads_of_its_own() -> None:
    code = f"""
import os, torch
from {module.__name__} import side_by_side
torch.set_num_threads(2)
assert side_by_side(4, lambda i: i) == [0, 1, 2, 3]
child = os.fork()
if not child:
    os._exit(0 if side_by_side(4, lambda i: i) == [0, 1, 2, 3] else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)
