"""Hostile slide lists and tables, and label tables of data sets."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from fuzz_bytes import damage
from fuzz_case import OUT, Case, Offence, command
from PIL import Image

from wsiseg.datasets.bcss_files import CODES, check_codes
from wsiseg.datasets.glas import GlaS, GlaSConfig
from wsiseg.datasets.pannuke import PanNuke
from wsiseg.errors import UsageError
from wsiseg.inference.cohort import collect
from wsiseg.slides import open_slide

CELLS = (
    *("a.png", "../a.png", "../../../../etc/passwd", "/etc/passwd", "..", ".", "/", "~", "", " "),
    *("nan", "inf", "-1", "1e999", "0", "9" * 400, "1e-400", "0x10", "1_0", "auto", "none", "=1+1"),
    *("a" * 300, "a/" * 3000, "a\0b", '"', '"a\nb"', "\x1b[2J", "loop", "\ud7ff", "#", "a,b", "*"),
    *("b" * 140_000, "é.png", "COM1", "http://x/y.svs", "-rf", "--help", "%s%n", "{0}", "$(id)"),
)
SUFFIXES = {".png", ".svs", ".tif"}


class Maker:
    """Makes lists that name one small slide, and much that is none."""

    def __init__(self, seeds: Path) -> None:
        pixels = np.full((60, 80, 3), 240, np.uint8)
        pixels[20:40, 20:60] = (180, 90, 160)
        Image.fromarray(pixels).save(seeds / "a.png")
        self.png = (seeds / "a.png").read_bytes()
        np.save(seeds / "a.npy", np.zeros((2, 8, 8, 3), np.uint8))
        self.npy = (seeds / "a.npy").read_bytes()

    def make(self, rng: random.Random, folder: Path) -> Case:
        """A list of slides, or a table of a data set."""
        (folder / "a.png").write_bytes(self.png)
        (folder / "loop").symlink_to("loop")
        roll = rng.random()
        if roll < 0.15:
            return self._grades(rng, folder)
        if roll < 0.25:
            return self._codes(rng, folder)
        if roll < 0.35:
            return self._arrays(rng, folder)
        path = folder / rng.choice(("slides.csv", "slides.csv", "slides.txt"))
        text = _csv(rng) if path.suffix == ".csv" else _lines(rng)
        data = text.encode("utf-8", "surrogatepass")
        path.write_bytes(damage(data, rng) if rng.random() < 0.3 else data)
        if rng.random() < 0.05:
            return Case(f"predict, {text[:60]!r}", lambda: _predict(path, folder / OUT))
        return Case(f"{path.suffix}: {text[:80]!r}", lambda: _collect(path))

    def _grades(self, rng: random.Random, folder: Path) -> Case:
        for name in ("train_1.png", "train_1_anno.png"):
            data = damage(self.png, rng) if rng.random() < 0.3 else self.png
            (folder / name).write_bytes(data)
        rows = [["name", "patient ID", "grade (GlaS)"], ["train_1", "1", "benign"]]
        (folder / "Grade.csv").write_bytes(_table(rng, rows, ","))

        def run() -> None:
            GlaS(folder, "train", GlaSConfig(classes="grades"))[0]

        return Case("Grade.csv", run)

    def _codes(self, rng: random.Random, folder: Path) -> Case:
        (folder / "meta").mkdir()
        rows = [["label", "GT_code"], *([label, str(i)] for i, label in enumerate(CODES))]
        (folder / "meta" / "gtruth_codes.tsv").write_bytes(_table(rng, rows, "\t"))
        return Case("gtruth_codes.tsv", lambda: check_codes(folder))

    def _arrays(self, rng: random.Random, folder: Path) -> Case:
        """The arrays of PanNuke, whose headers are Python literals."""
        (folder / "fold1").mkdir()
        for name in ("images", "masks", "types"):
            data = damage(self.npy, rng) if rng.random() < 0.7 else self.npy
            if rng.random() < 0.3:
                shape = rng.choice(("(9999999999,)", "(-1,)", "-" * 3000 + "1", "(" * 99, "0.5"))
                text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
                data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(9)
            (folder / "fold1" / f"{name}.npy").write_bytes(data)

        def run() -> None:
            PanNuke(folder, "fold1")[0]

        return Case("npy arrays", run)


def _csv(rng: random.Random) -> str:
    names = rng.choice((["path"], ["path", "mpp"], ["path", "mpp", "tissue"], ["tissue", "path"]))
    if rng.random() < 0.1:
        names = [rng.choice(CELLS) for _ in names]
    rows = [[rng.choice(CELLS) for _ in names] for _ in range(rng.choice((0, 1, 1, 3)))]
    rows.append([*(["a.png"] if names[0] == "path" else [""]), *[""] * (len(names) - 1)])
    if rng.random() < 0.1:
        rows[-1] *= 5
    return "\n".join(",".join(row) for row in [names, *rows])


def _lines(rng: random.Random) -> str:
    rows = [rng.choice(CELLS) for _ in range(rng.choice((0, 1, 1, 3)))]
    return rng.choice(("\n", "\r\n", "\r", "\v", "\u2028")).join([*rows, "a.png"])


def _table(rng: random.Random, rows: list[list[str]], sign: str) -> bytes:
    rows = [list(row) for row in rows]
    for _ in range(rng.choice((0, 1, 2))):
        row = rng.choice(rows)
        row[rng.randrange(len(row))] = rng.choice(CELLS)
    data = "\n".join(sign.join(row) for row in rows).encode("utf-8", "surrogatepass")
    return damage(data, rng) if rng.random() < 0.5 else data


def _collect(path: Path) -> None:
    """The slides of a list, and what each leads to; outputs must have names of one part."""
    for task in collect([str(path)], suffixes=SUFFIXES):
        if Path(task.stem).name != task.stem and task.stem:
            raise Offence(f"outputs called {task.stem!r}")
        try:
            open_slide(task.path, mpp=task.mpp or 0.5).close()
        except UsageError as e:
            raise Offence(f"a slide's failure ends all: {e}") from e


def _predict(path: Path, out: Path) -> None:
    command("predict", path, "--out", out, "--model", "stain-threshold", "--device", "cpu")
