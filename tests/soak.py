"""Many small slides through `wsiseg predict` in one process; whether memory or open files grow.

    python tests/soak.py --slides 200

Prints a JSON line: resident MiB, open files and threads after the first slides and at the end, and
by how much memory grew between; exit code 1 if anything was left open or memory grew by more than
--mib. Every fifth slide is damaged, so that failures are gone through, too.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "cli"))

import pytest
import torch
from tiny_run import predict, use_tiny_model

from wsiseg.cli.predict_slides import Slides
from wsiseg.geometry import Size
from wsiseg.slides.phantom import write_phantom

PROCESS = Path("/proc/self")
"""Where Linux tells of a process."""
WARM_UP = 10
"""Slides after which everything is loaded that ever will be."""


def make_slides(folder: Path, count: int) -> None:
    """Copies of one slide, every fifth time of a part of it."""
    whole, part = folder.parent / "whole.tif", folder.parent / "part.tif"
    write_phantom(whole, Size(140, 110), mpp=0.5, seed=3)
    data = whole.read_bytes()
    part.write_bytes(data[: len(data) // 2])
    folder.mkdir()
    for k in range(count):
        source = part if k % 5 == 4 else whole
        (folder / f"s{k:04d}.tif").write_bytes(source.read_bytes())


def soak(folder: Path, count: int) -> list[tuple[float, int, int]]:
    """(resident MiB, open files, threads) before each slide but the first ones, and at the end."""
    seen: list[tuple[float, int, int]] = []
    plain = Slides.work

    def look() -> None:
        gc.collect()
        pages = int((PROCESS / "statm").read_text().split()[1])
        files = len(list((PROCESS / "fd").iterdir()))
        seen.append((pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files, threading.active_count()))

    def work(slides: Slides, *args: Any, **more: Any) -> Any:
        look()
        return plain(slides, *args, **more)

    make_slides(folder / "in", count)
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_model(patch)
        patch.setattr(Slides, "work", work)
        with (
            Path(os.devnull).open("w") as quiet,
            contextlib.redirect_stdout(quiet),
            contextlib.redirect_stderr(quiet),
        ):
            code = predict(patch, folder / "in", "--out", folder / "out")
            look()
    done = len(list((folder / "out").glob("*.mask.ome.tif")))
    assert (code, done) == (1, count - count // 5), "what is whole is done"
    return seen[WARM_UP:]


def summed_up(seen: list[tuple[float, int, int]]) -> dict[str, Any]:
    """What is to be told of a soak; memory as medians of its first and last fifth."""
    memory, files, threads = zip(*seen, strict=True)
    fifth = max(1, len(seen) // 5)
    first, last = statistics.median(memory[:fifth]), statistics.median(memory[-fifth:])
    return {
        "slides": len(seen) - 1 + WARM_UP,
        "mib": [round(first, 1), round(last, 1)],
        "grown_mib": round(last - first, 1),
        "files": [files[0], files[-1]],
        "threads": [threads[0], threads[-1]],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--slides", type=int, default=200)
    parser.add_argument("--mib", type=float, default=20.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        report = summed_up(soak(Path(name), options.slides))
    print(json.dumps(report))
    leaks = report["grown_mib"] > options.mib or any(
        report[what][1] > report[what][0] for what in ("files", "threads")
    )
    sys.exit(leaks)
