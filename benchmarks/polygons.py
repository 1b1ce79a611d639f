"""Labels as polygons: exact, a valid coverage, the same for any band, and at what cost.

    python benchmarks/polygons.py --side 8192

The labels are six classes in ragged patches. Where these are everywhere, the area of each class
must be its pixels, to the pixel, before anything is simplified. On a part (--part, as checking
coverages is slow) the file must be the same byte for byte for several heights of the bands, the
regions those of narrower strips, and the polygons a valid coverage after simplification. The cost
is that of tracing and simplifying a slide (--size) with tissue on about 30 %, the memory that of
it and of writing a file with the defaults, in a process of its own. The tissue is in islands that
lie apart; with --one-piece thin bridges make it hang together.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import shapely
from shared import run
from stand_in_data import CHUNK_PX, dense_labels, fill_canvas, sparse_labels
from timing import Memory, Row, Span, in_child, open_row, row_options, timed, watched

from wsiseg.canvas import Canvas
from wsiseg.geometry import Size
from wsiseg.outputs.geojson import PolygonOptions, write_geojson
from wsiseg.outputs.polygons import trace

MAX_SECONDS, MAX_MIB = 0.035, 1300.0
BANDS_PX = (512, 200, 2048)
STRIPS_PX = (512, 200)
EVERYTHING: dict[str, Any] = {"min_area_um2": 0.0, "all_classes": True, "max_vertices": 10**9}
TOLERANCE_UM = 1.0


def area_error(canvas: Canvas) -> float:
    """The largest difference of a class between the area of its polygons and its pixels."""
    regions = trace(canvas)
    areas = np.bincount(regions.values, shapely.area(regions.polygons), len(canvas.classes) + 1)
    pixels = np.array(canvas.pixel_counts(), np.float64)
    return float(np.abs(areas[1:] - pixels[-len(canvas.classes) :]).max())


def files(canvas: Canvas, folder: Path) -> list[bytes]:
    """The GeoJSON at each height of the bands."""
    texts = []
    for band in BANDS_PX:
        path = folder / f"{band}.geojson"
        write_geojson(path, canvas, PolygonOptions(band_px=band, **EVERYTHING))
        texts.append(path.read_bytes())
    return texts


def same_in_strips(canvas: Canvas) -> bool:
    """Whether narrower strips give the same regions as one strip of the whole width."""
    whole = trace(canvas, strip_px=canvas.grid.size.width)
    parts = [trace(canvas, strip_px=width) for width in STRIPS_PX]
    return all(
        len(part) == len(whole) and bool(shapely.equals_exact(part.polygons, whole.polygons).all())
        for part in parts
    )


def is_coverage(text: bytes) -> bool:
    """Whether the polygons of a file, which cover a rectangle, leave no gap and do not overlap."""
    features = json.loads(text)["features"]
    shapes = np.array([shapely.geometry.shape(f["geometry"]) for f in features], object)
    if not len(shapes) or not shapely.coverage_is_valid(shapes):
        return False
    left, top, right, bottom = shapely.total_bounds(shapes)
    extent = (right - left) * (bottom - top)
    return bool(abs(shapely.area(shapes).sum() - extent) <= 1e-6 * extent)


def plain_cost(canvas_path: str) -> dict[str, Any]:
    """CPU seconds of tracing alone, and what comes of it; for a process of its own."""
    canvas, span = Canvas.open(canvas_path), Span()
    with timed(span):
        regions = trace(canvas)
    vertices = int(shapely.get_num_coordinates(regions.polygons).sum())
    return {"trace": span.cpu, "polygons": len(regions), "vertices": vertices}


def cost(canvas_path: str, geojson_path: str) -> dict[str, Any]:
    """CPU seconds of tracing and simplifying, and of a file, peak memory; for its own process."""
    canvas = Canvas.open(canvas_path)
    spans, memory = {name: Span() for name in ("simplified", "file")}, Memory()
    with watched(memory):
        with timed(spans["simplified"]):
            trace(canvas, tolerance_px=TOLERANCE_UM / canvas.grid.mpp)
        with timed(spans["file"]):
            write_geojson(geojson_path, canvas)
    return {**{name: span.cpu for name, span in spans.items()}, "mib": memory.mib}


def check(row: Row, canvas: Canvas, part: Canvas, folder: Path) -> None:
    """All that must be equal."""
    error = area_error(canvas)
    row.equal(f"areas of the classes: largest error {error:g} px", error == 0)
    texts = files(part, folder)
    bands = ", ".join(map(str, BANDS_PX))
    row.equal(f"{part.grid.size.width} px: bands of {bands} px", len(set(texts)) == 1)
    strips = ", ".join(map(str, STRIPS_PX))
    row.equal(f"{part.grid.size.width} px: strips of {strips} px", same_in_strips(part))
    row.equal(f"{part.grid.size.width} px: a valid coverage when simplified", is_coverage(texts[0]))


@click.command(help=__doc__.splitlines()[0])
@row_options
@click.option("--side", default=8192, show_default=True, help="Side of the labels in pixels.")
@click.option("--size", type=int, nargs=2, help="Of the slide to measure; default: a square.")
@click.option("--one-piece", is_flag=True, help="Tissue that hangs together everywhere.")
@click.option("--part", default=2048, show_default=True, help="Side of the part to check.")
def main(**words: Any) -> None:
    """Check, then measure."""
    row = open_row("polygons", words)
    side, part = words["side"], words["part"]
    block = dense_labels(max(CHUNK_PX, part))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        canvas = fill_canvas(folder / "canvas", Size(side, side), block)
        check(row, canvas, fill_canvas(folder / "part", Size(part, part), block), folder)
        tissue = sparse_labels(len(block), one_piece=words["one_piece"])
        size = Size(*(words["size"] or (side, side)))
        sparse = fill_canvas(folder / "sparse", size, tissue)
        plain = in_child(plain_cost, str(sparse.path))
        found = in_child(cost, str(sparse.path), str(folder / "all.geojson"))
    megapixels = size.width * size.height / 1e6
    seconds = found["simplified"] / megapixels
    row.judge("CPU seconds per Mpx, traced and simplified", seconds, "<=", MAX_SECONDS)
    row.judge("peak memory, MiB", found["mib"], "<=", MAX_MIB)
    row.note(
        size_px=list(size),
        tissue_share=float((tissue > 0).mean()),
        polygons=plain["polygons"],
        vertices=plain["vertices"],
        trace_cpu_s_per_mpx=plain["trace"] / megapixels,
        whole_file_cpu_s_per_mpx=found["file"] / megapixels,
    )
    row.finish()


if __name__ == "__main__":
    run(main)
