"""Are the borders between tiles visible? The probability jump across them against elsewhere.

    python benchmarks/seams.py --model glas-small --slide slide.svs --overlap 128 --overlap 256

The jump between two neighbouring pixels is half the sum of |p(x) - p(x - 1)| over the classes. It
is averaged over the pairs that straddle a border of tiles (anywhere on the lines on which some
window of the plan has one) and over all other pairs, where both pixels were analysed. Their ratio
is 1 where nobody could tell the borders. A slide is predicted several times, with the borders on
other pixels of it each time, as a few lines say more of what they happen to lie on than of seams.
The interval comes from drawing rows and columns of tiles anew (bootstrap).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from shared import (
    Maps,
    Within,
    common_options,
    finish,
    load,
    probabilities,
    region_box,
    run,
    table,
)

from wsiseg.errors import UsageError
from wsiseg.geometry import Box, Grid, Size
from wsiseg.inference.plan import Plan
from wsiseg.inference.predict import PredictOptions, prepare
from wsiseg.inference.slide_windows import for_slides
from wsiseg.models.segmenter import Segmenter
from wsiseg.slides.slide import Slide, open_slide
from wsiseg.slides.tissue import find_tissue

Sums = npt.NDArray[np.float64]
DRAWS = 1000


@dataclass(frozen=True)
class Seams:
    """Sums over bands of tiles, by axis: (bands, 4) jump and pairs at borders, and elsewhere."""

    x: Sums
    y: Sums

    def ratio(self, axis: str = "both") -> float:
        """Mean jump across borders over that elsewhere; axis x, y or both."""
        return _ratio({"x": self.x, "y": self.y, "both": np.concatenate([self.x, self.y])}[axis])

    def interval(self, *, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
        """Where 95 % of the ratios of both axes lie when bands are drawn with replacement."""
        rng = np.random.default_rng(seed)
        ratios = []
        for _ in range(draws):
            chosen = [s[rng.integers(0, len(s), len(s))] for s in (self.x, self.y)]
            ratios.append(_ratio(np.concatenate(chosen)))
        low, high = np.nanquantile(ratios, (0.025, 0.975))
        return float(low), float(high)

    def jumps(self) -> tuple[float, float]:
        """Mean jump across borders and elsewhere, both axes."""
        jump, pairs, other, other_pairs = np.concatenate([self.x, self.y]).sum(axis=0)
        return jump / max(1, pairs), other / max(1, other_pairs)

    @property
    def pairs(self) -> int:
        """Pairs of pixels that straddle a border."""
        return int(self.x[:, 1].sum() + self.y[:, 1].sum())


def _ratio(sums: Sums) -> float:
    jump, pairs, other, other_pairs = sums.sum(axis=0)
    if not (pairs and other_pairs and other):
        return float("nan")
    return float(jump / pairs / (other / other_pairs))


def measure_seams(maps: Maps, layout: Plan, origin: int = 0) -> Seams:
    """The jumps of probabilities (C, H, W), 0 in all classes where nothing was analysed.

    The first band begins at `origin`.
    """
    size, side = layout.grid.size, layout.tile_px
    lines = [border_lines(layout, axis, size[axis]) for axis in (0, 1)]
    x = [_band(maps[:, y : y + side], lines[0]) for y in range(origin, size.height, side)]
    y = [
        _band(maps[:, :, x : x + side].swapaxes(1, 2), lines[1])
        for x in range(origin, size.width, side)
    ]
    return Seams(np.array(x), np.array(y))


def border_lines(layout: Plan, axis: int, length: int) -> npt.NDArray[np.bool_]:
    """(length - 1,) whether a tile begins or ends between pixels i and i + 1 of axis 0 (x) or 1."""
    starts = np.unique(layout.tiles[:, axis])
    ends = np.concatenate([starts, starts + layout.tile_px])
    lines = np.zeros(max(0, length - 1), bool)
    lines[ends[(ends > 0) & (ends < length)] - 1] = True
    return lines


def _band(band: Maps, lines: npt.NDArray[np.bool_]) -> list[float]:
    """Jump and pairs at borders, then elsewhere, along the last axis of (C, h, W)."""
    values = np.asarray(band, np.float32)
    jump = np.abs(np.diff(values, axis=2)).sum(axis=0, dtype=np.float64) / 2
    seen = values.sum(axis=0) > 0
    both = seen[:, 1:] & seen[:, :-1]
    sums = []
    for chosen in (lines, ~lines):
        inside = both[:, chosen]
        sums += [float(jump[:, chosen][inside].sum()), float(inside.sum())]
    return sums


def seams_of(
    slide: Slide,
    segmenter: Segmenter,
    options: PredictOptions,
    region: tuple[int, ...] | None,
    shifts: int = 1,
) -> Seams:
    """The seams of a slide's tissue at one overlap, over so many positions of the borders.

    Raises:
        UsageError: no border of tiles lies in the tissue.
    """
    grid = slide.grid(segmenter.info.mpp)
    tissue = Within(find_tissue(slide), region_box(region, grid))
    window = segmenter.info.window_px
    step = window - options.overlap_of(window)
    found = [
        _shifted_seams(i * step // shifts, slide, tissue, segmenter, options) for i in range(shifts)
    ]
    seams = Seams(sum(s.x for s in found), sum(s.y for s in found))
    if not seams.pairs:
        raise UsageError(f"{slide.path}: no border of tiles lies in tissue; take a larger slide")
    return seams


def _shifted_seams(
    margin: int, slide: Slide, tissue: Within, segmenter: Segmenter, options: PredictOptions
) -> Seams:
    grid = slide.grid(segmenter.info.mpp)
    moved: Any = Moved(slide, grid, margin)
    within = MovedTissue(tissue, grid, margin)
    with tempfile.TemporaryDirectory() as folder:
        maps, _ = probabilities(moved, segmenter, Path(folder), options=options, tissue=within)
        layout = prepare(moved.grid(), segmenter, options=options, tissue=within).layout
        seams = measure_seams(maps, layout, margin)
        del maps
    return seams


class Moved:
    """A slide with a margin of white at the left and at the top, at one resolution."""

    def __init__(self, slide: Slide, grid: Grid, margin: int) -> None:
        """The margin in pixels of the grid."""
        self._slide, self._grid, self._margin = slide, grid, margin

    def __getattr__(self, name: str) -> Any:
        """What else there is to know is the slide's."""
        return getattr(self._slide, name)

    def grid(self, _: float | None = None) -> Grid:
        """The pixels of slide and margin."""
        width, height = self._grid.size
        return replace(self._grid, size=Size(width + self._margin, height + self._margin))

    def read(self, box: Box, _: Grid) -> npt.NDArray[np.uint8]:
        """The pixels of a box, white in the margin."""
        return self._slide.read(_moved(box, self._margin), self._grid)


@dataclass(frozen=True)
class MovedTissue:
    """The tissue of a moved slide."""

    tissue: Within
    grid: Grid
    margin: int

    @property
    def mask(self) -> npt.NDArray[Any]:
        """The whole mask, without the margin."""
        return self.tissue.mask

    def covers(self, box: Box, _: Grid) -> bool:
        """Whether any pixel of the box is tissue."""
        return self.tissue.covers(_moved(box, self.margin), self.grid)

    def region(self, box: Box, _: Grid) -> npt.NDArray[np.bool_]:
        """(h, w) bool, which pixels of the box are tissue."""
        return self.tissue.region(_moved(box, self.margin), self.grid)


def _moved(box: Box, margin: int) -> Box:
    return Box(box.x - margin, box.y - margin, box.width, box.height)


@click.command(help=__doc__.splitlines()[0])
@common_options
@click.option("--overlap", "overlaps", type=int, multiple=True, help="Default: as of predict.")
@click.option(
    "--shifts",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="How often a slide is predicted, each time with the borders elsewhere; odd numbers, as "
    "windows that overlap by a third have borders twice a step.",
)
@click.option("--precision", default="auto", show_default=True, help="As of wsiseg predict.")
@click.option("--seed", default=0, show_default=True, help="Of the noise.")
@click.option(
    "--region",
    type=int,
    nargs=4,
    help="X Y WIDTH HEIGHT to look at, in pixels at the model's resolution.",
)
@click.option("--max-ratio", default=1.2, show_default=True, help="Above it the exit code is 1.")
def main(**words: Any) -> None:
    """Measure the seams of each slide at each overlap."""
    segmenter = for_slides(load(words["model"], words["device"], words["threads"]))
    rows, found = [], []
    for path in words["slides"]:
        for overlap in words["overlaps"] or (None,):
            options = PredictOptions(
                overlap_px=overlap, precision=words["precision"], seed=words["seed"]
            )
            with open_slide(path, mpp=words["mpp"]) as slide:
                seams = seams_of(slide, segmenter, options, words["region"], words["shifts"])
            taken = options.overlap_of(segmenter.info.window_px)
            found.append(_numbers(Path(path).name, taken, seams))
            rows.append(_row(found[-1]))
    click.echo(table(("slide", "overlap", "x", "y", "both", "95 %", "border", "elsewhere"), rows))
    limit = words["max_ratio"]
    verdict, passed = verdict_of([f["ratio"] for f in found], limit)
    result = {
        "shifts": words["shifts"],
        "seams": found,
        "max_ratio": limit,
        "verdict": verdict,
        "passed": passed,
    }
    finish(words["json_path"], segmenter, result)


def verdict_of(ratios: list[float], limit: float) -> tuple[str, bool]:
    """What all ratios together say, and whether they are met."""
    worst = float(np.max(ratios))  # not a number where one of them is not
    if np.isnan(worst):
        return (
            "seams: the probabilities of a slide are the same everywhere, so nothing is told",
            False,
        )
    sign = "at most" if worst <= limit else "above"
    return f"seams: the largest ratio is {worst:.3f}, {sign} {limit:g}", worst <= limit


def _numbers(name: str, overlap: int, seams: Seams) -> dict[str, Any]:
    border, elsewhere = seams.jumps()
    return {
        "slide": name,
        "overlap_px": overlap,
        "ratio": seams.ratio(),
        "ratio_x": seams.ratio("x"),
        "ratio_y": seams.ratio("y"),
        "interval": seams.interval(),
        "border_jump": border,
        "elsewhere_jump": elsewhere,
        "border_pairs": seams.pairs,
    }


def _row(numbers: dict[str, Any]) -> list[str]:
    low, high = numbers["interval"]
    ratios = [f"{numbers[k]:.3f}" for k in ("ratio_x", "ratio_y", "ratio")]
    jumps = [f"{numbers[k]:.5f}" for k in ("border_jump", "elsewhere_jump")]
    span = f"{low:.3f}..{high:.3f}"
    return [numbers["slide"], str(numbers["overlap_px"]), *ratios, span, *jumps]


if __name__ == "__main__":
    run(main)
