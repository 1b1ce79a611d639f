"""What does a model paint on slides of any tissue, and on glass? Shares, confidences, pictures.

    python benchmarks/behaviour.py --model glas-small --slide skin.svs --out behaviour/

The whole slide is predicted, glass included, and counted apart inside and outside of the tissue
that `wsiseg predict` would find. A model without the organ in its training should paint little
of it and, where it does, not be sure. OUT gets an overview of each slide.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from shared import common_options, finish, load, run, table

from wsiseg.canvas import Canvas
from wsiseg.classes import Classes
from wsiseg.errors import OutputError
from wsiseg.geometry import Box
from wsiseg.inference.predict import PredictOptions, predict_slide
from wsiseg.inference.slide_windows import for_slides
from wsiseg.models.segmenter import Segmenter
from wsiseg.outputs.overview import write_overview
from wsiseg.slides.slide import open_slide
from wsiseg.slides.tissue import TissueMask, find_tissue

AREAS = ("glass", "tissue")
SURE = 0.9
Table = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]


@dataclass
class Painted:
    """Sums by area (glass, tissue) and class: pixels, confidence, pixels with confidence > SURE."""

    count: int
    pixels: Table = field(init=False)
    confidence: Table = field(init=False)
    sure: Table = field(init=False)

    def __post_init__(self) -> None:
        self.pixels, self.confidence, self.sure = (
            np.zeros((len(AREAS), self.count)) for _ in range(3)
        )

    def add(self, labels: UInt8, confidence: UInt8, tissue: npt.NDArray[np.bool_]) -> None:
        """Count pixels: labels 1..C and confidences 0..255 as in a canvas, and what is tissue."""
        seen = labels > 0
        index = (tissue[seen] * self.count + labels[seen] - 1).astype(np.int64)
        values = confidence[seen] / 255

        def summed(weights: Table | None) -> Table:
            cells = np.bincount(index, weights, minlength=len(AREAS) * self.count)
            return cells.reshape(len(AREAS), self.count).astype(np.float64)

        self.pixels += summed(None)
        self.confidence += summed(values)
        self.sure += summed((values > SURE).astype(np.float64))

    def rows(self, classes: Classes, pixel_mm2: float) -> list[dict[str, Any]]:
        """A row for each area and class; shares in percent, None where there is nothing."""
        rows = []
        for a, area in enumerate(AREAS):
            total = float(self.pixels[a].sum())
            for k, item in enumerate(classes):
                pixels, sure = float(self.pixels[a, k]), float(self.sure[a, k])
                rows.append(
                    {
                        "area": area,
                        "area_mm2": total * pixel_mm2,
                        "class": item.name,
                        "background": item.background,
                        "percent": 100 * pixels / total if total else None,
                        "confidence": float(self.confidence[a, k]) / pixels if pixels else None,
                        "sure_percent": 100 * sure / pixels if pixels else None,
                    }
                )
        return rows


def count_canvas(canvas: Canvas, tissue: TissueMask) -> Painted:
    """What a canvas of a whole slide holds on glass and on tissue."""
    painted = Painted(len(canvas.classes))
    width, height = canvas.grid.size
    for y in range(0, height, canvas.chunk_px):
        box = Box(0, y, width, min(canvas.chunk_px, height - y))
        inside = tissue.region(box, canvas.grid)
        painted.add(canvas.labels(box), canvas.confidence(box), inside)
    return painted


def names_of(paths: Sequence[str]) -> list[str]:
    """The name of each file, numbered where it comes again: 1.svs, 1.svs (2)."""
    seen: Counter[str] = Counter()
    names = []
    for name in (Path(path).name for path in paths):
        seen[name] += 1
        names.append(f"{name} ({seen[name]})" if seen[name] > 1 else name)
    return names


def one_slide(
    path: str, name: str, segmenter: Segmenter, words: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of a slide; its overview goes to the folder `out`."""
    options = PredictOptions(overlap_px=words["overlap"], precision=words["precision"])
    with (
        open_slide(path, mpp=words["mpp"]) as slide,
        tempfile.TemporaryDirectory() as folder,
    ):
        canvas = predict_slide(slide, segmenter, Path(folder, "canvas"), options=options)
        painted = count_canvas(canvas, find_tissue(slide))
        if words["out"] is not None:
            write_overview(words["out"] / f"{name}.overview.png", canvas)
    pixel_mm2 = canvas.grid.pixel_area_um2 / 1e6
    return [{"slide": name, **row} for row in painted.rows(segmenter.info.classes, pixel_mm2)]


@click.command(help=__doc__.splitlines()[0])
@common_options
@click.option("--out", type=click.Path(path_type=Path), help="Folder for an overview a slide.")
@click.option("--overlap", type=int, help="Pixels windows have in common; default as of predict.")
@click.option("--precision", default="auto", show_default=True, help="As of wsiseg predict.")
@click.option(
    "--max-glass",
    default=1.0,
    show_default=True,
    help="Percent of a slide's glass that may be painted with other than background classes.",
)
@click.option("--max-tissue", type=float, help="The same of tissue, for slides of other organs.")
def main(**words: Any) -> None:
    """Measure what is painted on each slide."""
    segmenter = for_slides(load(words["model"], words["device"], words["threads"]))
    if words["out"] is not None:
        _make(words["out"])
    slides = zip(words["slides"], names_of(words["slides"]), strict=True)
    rows = [row for path, name in slides for row in one_slide(path, name, segmenter, words)]
    head = ("slide", "area", "mm2", "class", "share", "confidence", f"above {SURE:g}")
    click.echo(table(head, [_cells(row) for row in rows]))
    limits = {"glass": words["max_glass"], "tissue": words["max_tissue"]}
    result = {"rows": rows, "max_percent": limits, **judged(rows, limits)}
    finish(words["json_path"], segmenter, result)


def judged(rows: list[dict[str, Any]], limits: dict[str, float | None]) -> dict[str, Any]:
    """The verdict: the most of an area that is painted with classes other than background."""
    if not any(row["background"] for row in rows):
        return {
            "verdict": "behaviour: no class is background, so that all is painted; not judged",
            "passed": None,
        }
    words, passed = [], True
    for area in AREAS:
        shares: dict[str, float] = {}
        for row in rows:
            if row["area"] == area and not row["background"] and row["percent"] is not None:
                shares[row["slide"]] = shares.get(row["slide"], 0.0) + row["percent"]
        most, limit = max(shares.values(), default=0.0), limits[area]
        good = limit is None or most <= limit
        passed &= good
        judgement = "" if limit is None else f", {'at most' if good else 'above'} {limit:g} %"
        words.append(f"{most:.2f} % of {area}{judgement}")
    return {"verdict": f"behaviour: painted at most {'; '.join(words)}", "passed": passed}


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"--out {folder}: cannot write there ({e.strerror or e})") from e


def _cells(row: dict[str, Any]) -> list[str]:
    shares = ["-" if row[k] is None else f"{row[k]:.2f} %" for k in ("percent", "sure_percent")]
    confidence = "-" if row["confidence"] is None else f"{row['confidence']:.3f}"
    area = f"{row['area_mm2']:.3f}"
    return [row["slide"], row["area"], area, row["class"], shares[0], confidence, shares[1]]


if __name__ == "__main__":
    run(main)
