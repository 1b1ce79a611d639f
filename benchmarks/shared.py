"""What the benchmarks share: slides through `predict`, its probabilities kept; options, tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import numpy.typing as npt
import torch

import wsiseg.inference.predict as predicting
from wsiseg.atomic import staged
from wsiseg.canvas import Canvas
from wsiseg.errors import UsageError, WsisegError
from wsiseg.geometry import Box, Grid
from wsiseg.inference.blend import Blender
from wsiseg.inference.contracts import TissueLike
from wsiseg.inference.predict import PredictOptions, predict_slide
from wsiseg.models.checkpoint import load_model
from wsiseg.models.segmenter import Segmenter
from wsiseg.slides.slide import Slide

Maps = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Within:
    """The part of a tissue mask inside a box of a grid."""

    tissue: TissueLike
    box: Box

    @property
    def mask(self) -> npt.NDArray[Any]:
        """The whole mask."""
        return self.tissue.mask

    def covers(self, box: Box, grid: Grid) -> bool:
        """Whether any pixel of the box is tissue and inside."""
        return self.tissue.covers(box.intersection(self.box), grid)

    def region(self, box: Box, grid: Grid) -> npt.NDArray[np.bool_]:
        """(h, w) bool, which pixels of the box are tissue and inside."""
        kept = np.zeros((box.height, box.width), bool)
        inner = box.intersection(self.box)
        if not inner.is_empty():
            place = Box(inner.x - box.x, inner.y - box.y, inner.width, inner.height)
            kept[place.slices] = self.tissue.region(inner, grid)
        return kept


class KeepingBlender(Blender):
    """A blender that also keeps the blended probabilities, before they are rounded to labels."""

    whole = True

    def __init__(self, *args: Any, maps: Maps, tissue: TissueLike | None, **options: Any) -> None:
        """Keeps what it writes in `maps` (C, H, W)."""
        super().__init__(*args, tissue=tissue, **options)
        self._kept, self._within = maps, tissue

    def write(self, row: int, column: int, state: Maps) -> None:
        """Write a chunk (C + ..., h, w), the last map being the sum of weights."""
        box = self._canvas.chunk_box(row, column)
        seen = state[-1] > 0
        if self._within is not None:
            seen &= self._within.region(box, self._canvas.grid)
        self._kept[(slice(None), *box.slices)] = state[: len(self._kept)] * seen
        super().write(row, column, state)


def probabilities(
    slide: Slide,
    segmenter: Segmenter,
    folder: Path,
    *,
    options: PredictOptions,
    tissue: TissueLike | None,
) -> tuple[Maps, Canvas]:
    """A slide through `predict_slide`, with its probabilities as they were before rounding.

    Args:
        slide: an open slide.
        segmenter: the model.
        folder: an empty folder, which gets the canvas and a file with the maps.
        options: as of `predict_slide`.
        tissue: where to look; None looks everywhere.

    Returns:
        (C, H, W) float32, kept in a file, 0 in all classes where nothing was analysed, and the
        canvas.
    """
    grid = slide.grid(segmenter.info.mpp)
    shape = (len(segmenter.info.classes), grid.size.height, grid.size.width)
    maps = np.memmap(folder / "maps.f32", np.float32, "w+", shape=shape)
    with mock.patch.object(predicting, "Blender", partial(KeepingBlender, maps=maps)):
        canvas = predict_slide(slide, segmenter, folder / "canvas", options=options, tissue=tissue)
    return maps, canvas


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every benchmark has."""
    options = [
        click.option("--model", default="glas-small", show_default=True, help="Name or file."),
        click.option("--slide", "slides", required=True, multiple=True, help="Slide or image."),
        click.option("--mpp", type=float, help="Micrometres per pixel, where files state none."),
        click.option("--device", default="cpu", show_default=True, help="Where to compute."),
        click.option("--threads", type=click.IntRange(1), help="Threads of torch."),
        click.option("--json", "json_path", type=click.Path(path_type=Path), help="Numbers here."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def load(model: str, device: str, threads: int | None) -> Segmenter:
    """The model, on so many threads."""
    if threads is not None:
        torch.set_num_threads(threads)
    segmenter = load_model(model, device=device)
    click.echo(
        f"model {segmenter.info.name} ({segmenter.info.sha256[:12]}), {segmenter.info.mpp:g} um "
        f"per pixel, on {device} with {torch.get_num_threads()} threads"
    )
    return segmenter


def region_box(values: Sequence[int] | None, grid: Grid) -> Box:
    """The box X Y WIDTH HEIGHT of a grid; all of it where nothing is given.

    Raises:
        UsageError: it lies outside.
    """
    if values is None:
        return grid.box
    box = Box(*values).intersection(grid.box)
    if box.is_empty():
        width, height = grid.size
        raise UsageError(
            f"--region {' '.join(map(str, values))}: outside the slide, which is {width} x {height}"
            f" px at the model's resolution"
        )
    return box


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]
    return "\n".join(lines)


def finish(json_path: Path | None, segmenter: Segmenter, result: dict[str, Any]) -> None:
    """Write the numbers, say the verdict, and end the process with 1 where it is bad.

    Args:
        json_path: file for `result`, or None.
        segmenter: the model.
        result: numbers, with `verdict`, a sentence, and `passed`, None where nothing is judged.
    """
    info = segmenter.info
    known = {"model": info.name, "sha256": info.sha256, "threads": torch.get_num_threads()}
    if json_path is not None:
        with staged(json_path) as (temporary,):
            temporary.write_text(json.dumps({**known, **result}, indent=1) + "\n")
    click.echo(result["verdict"])
    if result["passed"] is False:
        sys.exit(1)


def run(command: click.Command) -> None:
    """Run a benchmark; what is wrong with its input is one line."""
    try:
        command()
    except WsisegError as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(e.exit_code)
