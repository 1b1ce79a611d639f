"""Kills `wsiseg predict` at random moments, continues it, compares with an uninterrupted run.

    python tests/kill_predict.py --kills 200 [--seed 0] [--border] [--every]

Half of the kills come after a random time, half before the n-th change to the output folder (a file
opened for writing, renamed or removed, a folder made); with --every, before each of those changes
in turn. Mask and GeoJSON must come out byte for byte, and a window whose chunks were all done must
not be computed again. Prints a JSON line; exit code 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "inference"))

import torch
from inference_fakes import stain_model
from torch import Tensor

import wsiseg.cli.predict_run as predict_run
import wsiseg.inference.predict as predicting
from wsiseg.canvas import Canvas
from wsiseg.classes import Classes, TissueClass
from wsiseg.cli import main
from wsiseg.errors import CanvasError
from wsiseg.geometry import Size
from wsiseg.inference.engine import Engine
from wsiseg.models.base import FeatureExtractor, Features, FeatureSpec, Head, lay_out
from wsiseg.models.segmenter import ModelInfo, Segmenter
from wsiseg.objects import ObjectsConfig
from wsiseg.slides.phantom import write_phantom

WINDOW, TILE, OVERLAP, CHUNK = 96, 32, 32, 64
SIZE = Size(300, 230)
RESULTS = ("s.mask.ome.tif", "s.geojson")
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}


class Pixels(FeatureExtractor):
    """The pixels themselves."""

    tile_px = TILE
    specs = (FeatureSpec(3, TILE),)

    def forward(self, images: Tensor, places: Any, seed: int) -> Features:
        return (images,)


class Reads(Head):
    """Gland where there is little green, its border where there is some red."""

    class_count = 3

    def forward(self, features: Features) -> Tensor:
        red, green, _ = lay_out(features[0]).unbind(1)
        return torch.stack((9 * green, -9 * green, 9 * red - 5), dim=1)


def border_model() -> Segmenter:
    """A model whose labels are cleaned and parted into objects."""
    classes = Classes((TissueClass("rest", (0, 0, 9), True), TissueClass("gland", (9, 0, 0))))
    objects = ObjectsConfig(min_area_um2=9.0, max_hole_um2=6.0, min_core_um2=4.0, reach_um=3.0)
    info = ModelInfo(
        *("border", "1" * 64, classes, 0.5, WINDOW, TILE), border=True, objects=objects
    )
    return Segmenter(Pixels(), Reads(), info)


def forked(work: Callable[[], int]) -> int:
    """Process number of a child that does some work and ends with its code."""
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        code = work()
    except SystemExit as e:
        code = int(e.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(number: int) -> int:
    """Exit code of a child, minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


class Killer:
    """One output folder, and what ran on it."""

    def __init__(self, slide: Path, out: Path, *, border: bool) -> None:
        self.slide, self.out, self.border = slide, out, border
        self.log = out.with_suffix(".log")
        self.computed = self.again = 0

    def run(self, *, at_change: int = 0, after_s: float | None = None) -> int:
        """Run predict, killed where it is said; returns its exit code, -9 if it was killed."""
        self.log.write_text("")
        number = forked(lambda: self._predict(at_change))
        if after_s is not None:
            deadline = time.monotonic() + after_s
            while time.monotonic() < deadline:
                if os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    break
                time.sleep(0.001)
            else:
                os.kill(number, signal.SIGKILL)
        code = ended(number)
        self._count()
        return code

    @property
    def changes(self) -> int:
        """How many changes the last run made to the folder."""
        return self.log.read_text().count("change\n")

    def _predict(self, at_change: int) -> int:
        torch.set_num_threads(1)
        model = border_model() if self.border else stain_model(WINDOW, TILE)
        predict_run.load_model = lambda *args, **more: model  # type: ignore[assignment]
        predicting.CHUNK_PX = CHUNK
        log = os.open(self.log, os.O_WRONLY | os.O_APPEND)
        self._watch(log, at_change)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        sys.argv = ["wsiseg", "predict", str(self.slide), "--out", str(self.out)]
        sys.argv += ["--overlap", str(OVERLAP), "--tissue", "none", "--memory", "0.01"]
        sys.argv += ["--min-area", "5", "--device", "cpu"]
        main()
        return 0

    def _watch(self, log: int, at_change: int) -> None:
        """Log what was done before and what is computed and changed; kill before a change."""
        try:
            canvas = Canvas.open(self.out / "s.canvas")
            done = [f"done {r} {c}\n" for r, c in canvas.chunks() if canvas.is_done(r, c)]
        except CanvasError:
            done = []
        os.write(log, "".join(done).encode())
        plain = Engine.classify

        def classify(engine: Engine, features: Features, places: Any) -> Tensor:
            os.write(log, "".join(f"window {p.x} {p.y}\n" for p in places).encode())
            return plain(engine, features, places)

        Engine.classify = classify  # type: ignore[method-assign]
        counter, root = itertools.count(1), str(self.out)

        def hook(event: str, args: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(args[2], int) and args[2] & 3
            if not writes and event not in CHANGES:
                return
            path = str(args[0])
            if os.path.isabs(path) and not path.startswith(root):  # noqa: PTH117
                return
            if next(counter) == at_change:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(log, b"change\n")

        sys.addaudithook(hook)

    def _count(self) -> None:
        """Count the windows that were computed though all that they touch was done."""
        done, windows = set(), []
        for line in self.log.read_text().splitlines():
            kind, *numbers = line.split()
            if kind == "done":
                done.add(tuple(map(int, numbers)))
            elif kind == "window":
                windows.append(tuple(map(int, numbers)))
        self.computed += len(windows)
        for x, y in windows:
            right, bottom = min(x + WINDOW, SIZE.width), min(y + WINDOW, SIZE.height)
            rows = range(y // CHUNK, -(-bottom // CHUNK))
            columns = range(x // CHUNK, -(-right // CHUNK))
            self.again += all((r, c) in done for r in rows for c in columns)

    def results(self) -> list[bytes]:
        """Mask and polygons."""
        return [(self.out / name).read_bytes() for name in RESULTS]


def wrong(killer: Killer, expected: list[bytes], code: int) -> list[str]:
    """What is wrong after a run."""
    out = killer.out
    if code == -signal.SIGKILL:
        whole = not (out / "s.json").exists() or killer.results() == expected
        return [] if whole else ["a record beside other outputs"]
    found = [] if code == 0 else [f"exit code {code}"]
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    wanted = {"s.json", "s.overview.png", "run.json", "summary.csv", *RESULTS}
    if names != wanted:
        found.append(f"files {sorted(names ^ wanted)}")
    elif killer.results() != expected:
        found.append("other bytes")
    elif "ok" not in (out / "summary.csv").read_text():
        found.append("no row in the table")
    return found + ["windows computed again"] * bool(killer.again)


def moments(args: argparse.Namespace, changes: int, seconds: float) -> Any:
    """Where to kill, over and over or, with --every, each change once."""
    if args.every:
        return iter([{"at_change": n} for n in range(1, changes + 1)])
    chance = random.Random(args.seed)
    kinds = (
        lambda: {"at_change": chance.randint(1, changes)},
        lambda: {"after_s": chance.uniform(0, seconds)},
    )
    return (kind() for kind in itertools.cycle(kinds))


def attack(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kill as often as was asked for; says what was found."""
    slide, chance = folder / "s.tif", random.Random(args.seed + 1)
    write_phantom(slide, SIZE, mpp=0.5, seed=3)
    whole = Killer(slide, folder / "whole", border=args.border)
    began = time.monotonic()
    assert whole.run() == 0, "the uninterrupted run failed"
    seconds, changes, expected = time.monotonic() - began, whole.changes, whole.results()
    report: dict[str, Any] = {"changes": changes, "windows": whole.computed, "kills": 0}
    report |= {"continued": 0, "seconds": round(seconds, 2), "wrong": []}
    where = moments(args, changes, seconds)
    end = False
    while not end and (args.every or report["kills"] < args.kills):
        killer = Killer(slide, folder / "out", border=args.border)
        said: list[Any] = []
        for _ in range(1 if args.every else chance.randint(1, 3)):
            moment = next(where, None)
            if moment is None:
                end = True
                break
            said.append(moment)
            code = killer.run(**moment)
            report["kills"] += code == -signal.SIGKILL
            report["wrong"] += [f"{said}: {w}" for w in wrong(killer, expected, code)]
        before = killer.computed
        code = killer.run()
        report["wrong"] += [f"{said}, then to the end: {w}" for w in wrong(killer, expected, code)]
        report["continued"] += killer.computed - before < whole.computed
        shutil.rmtree(killer.out, ignore_errors=True)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--border", action="store_true")
    parser.add_argument("--every", action="store_true")
    with tempfile.TemporaryDirectory() as name:
        result = attack(parser.parse_args(), Path(name))
    print(json.dumps(result))
    sys.exit(bool(result["wrong"]))
