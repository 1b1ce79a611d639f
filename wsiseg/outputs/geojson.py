"""Regions as a GeoJSON file that QuPath imports as annotations. Knows no slides and no masks."""

from __future__ import annotations

import codecs
import gzip
import json
import logging
import math
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import geojson
import numpy as np
import numpy.typing as npt
import shapely

from wsiseg import __version__
from wsiseg.atomic import staged
from wsiseg.canvas import Canvas
from wsiseg.classes import TissueClass
from wsiseg.errors import UsageError
from wsiseg.geometry import Grid
from wsiseg.outputs.coverage import simplify
from wsiseg.outputs.level0 import to_level0
from wsiseg.outputs.polygons import Regions, trace
from wsiseg.outputs.tracer import BAND_PX

log = logging.getLogger(__name__)

_NAMESPACE = uuid.UUID("7c1b6f5e-3c0f-5b0e-9c55-0f6f3d3f8a11")
_MAX_TOLERANCE_UM = 1000.0
_COMPACT = (",", ":")
_WRITER = codecs.getwriter("utf-8")
OPENING = '{"type":"FeatureCollection","features":[\n'
"""How every file begins, and none that QuPath writes."""
_SPEED_ONLY = {"batch_size", "workers", "memory_gib", "device"}
"""Parameters that do not change what is computed, so not the ids either."""


@dataclass(frozen=True)
class PolygonOptions:
    """How regions become polygons.

    Attributes:
        min_area_um2: smaller regions are dropped and smaller holes filled.
        tolerance_um: how far borders may be simplified: corners that make a triangle of less
            than its square go first (Visvalingam-Whyatt); 0 keeps the pixel edges.
        all_classes: export background classes too.
        max_vertices: while the file would have more, the tolerance is raised, if that helps.
        gzip: write .geojson.gz.
        band_px: rows traced at a time; changes memory, not the result.
    """

    min_area_um2: float = 50.0
    tolerance_um: float = 1.0
    all_classes: bool = False
    max_vertices: int = 500_000
    gzip: bool = False
    band_px: int = BAND_PX

    def __post_init__(self) -> None:
        for name in ("min_area_um2", "tolerance_um"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"polygons: {name} must be 0 or more, not {value}")
        for name in ("max_vertices", "band_px"):
            if getattr(self, name) < 1:
                raise UsageError(f"polygons: {name} must be 1 or more")

    def min_area_px(self, grid: Grid) -> float:
        """The minimum area in pixels of a grid."""
        return self.min_area_um2 / grid.pixel_area_um2

    def tolerance_px(self, grid: Grid) -> float:
        """The tolerance in pixels of a grid."""
        return self.tolerance_um / math.sqrt(grid.pixel_area_um2)


@dataclass(frozen=True)
class GeoJsonReport:
    """What was written.

    Attributes:
        features: polygons in the file.
        vertices: their vertices, rings closed.
        tolerance_um: the tolerance that was used.
        tolerance_raised: whether that is more than asked for, to keep to the vertex budget.
        dropped_small: regions of the exported classes under the minimum area.
        dropped_collapsed: regions of which simplifying left no area.
        within_budget: whether `max_vertices` was kept.
    """

    features: int
    vertices: int
    tolerance_um: float
    tolerance_raised: bool
    dropped_small: int
    dropped_collapsed: int
    within_budget: bool


class _Shapes(NamedTuple):
    """Polygons of the exported regions, in grid pixels."""

    polygons: npt.NDArray[np.object_]
    chosen: npt.NDArray[np.int64]
    tolerance_um: float

    @property
    def vertices(self) -> int:
        """How many there are, rings closed."""
        return int(shapely.get_num_coordinates(self.polygons).sum())


def write_geojson(
    path: str | Path,
    canvas: Canvas,
    options: PolygonOptions | None = None,
    *,
    regions: Regions | None = None,
) -> GeoJsonReport:
    """Write the regions of a canvas as a GeoJSON FeatureCollection for QuPath.

    One feature for each object, or 4-connected region of what has no objects, with holes, in
    level-0 pixels of the canvas's frame, the largest of each class first. The borders of all
    classes are simplified together, exported or not, so that neighbours keep sharing them and a
    class looks the same whatever else is exported. "Area um^2" and "Mean probability" are those of
    the region's own pixels, before holes were filled and borders simplified. The same run gives the
    same ids.

    Memory bound: that of `wsiseg.outputs.polygons.assemble`.

    Args:
        path: the file; it appears when it is complete. Its name is taken as it is.
        canvas: labels and confidences.
        options: see `PolygonOptions`.
        regions: those of the canvas, traced with the same minimum area and at most the same
            tolerance; None: they are traced now.

    Raises:
        OutputError: the file cannot be written.
    """
    options = options or PolygonOptions()
    exported = np.zeros(256, bool)
    for value, item in canvas.classes.values():
        exported[value] = options.all_classes or not item.background
    if regions is None:
        regions = trace(
            canvas,
            band_px=options.band_px,
            min_area_px=options.min_area_px(canvas.grid),
            tolerance_px=options.tolerance_px(canvas.grid),
        )
    shapes = _within_budget(regions, exported, options, math.sqrt(canvas.grid.pixel_area_um2))
    with staged(Path(path)) as (temporary,), _text(temporary, options.gzip) as out:
        features, vertices = _write(out, canvas, options, regions, shapes)
    report = GeoJsonReport(
        features=features,
        vertices=vertices,
        tolerance_um=round(shapes.tolerance_um, 4),
        tolerance_raised=shapes.tolerance_um > options.tolerance_um,
        dropped_small=int(regions.dropped[exported].sum()),
        dropped_collapsed=len(shapes.chosen) - features,
        within_budget=vertices <= options.max_vertices,
    )
    if report.tolerance_raised:
        log.info(
            "polygons: tolerance raised from %g to %g um: %d vertices, the limit is %d",
            options.tolerance_um,
            report.tolerance_um,
            vertices,
            options.max_vertices,
        )
    return report


def _within_budget(
    regions: Regions, exported: npt.NDArray[np.bool_], options: PolygonOptions, mpp: float
) -> _Shapes:
    """The exported regions, all simplified further to keep to the vertex budget, where that helps.

    A higher tolerance continues from the lower one: corners go in the order of their triangles,
    so starting again would come to the same place.
    """
    index = np.flatnonzero(exported[regions.values])
    polygons, tolerance = regions.polygons, options.tolerance_um
    if len(index) and tolerance / mpp > regions.tolerance_px:
        polygons = simplify(polygons, tolerance / mpp)
    asked = found = _Shapes(polygons[index], index, tolerance)
    while (excess := found.vertices / options.max_vertices) > 1:
        if tolerance >= _MAX_TOLERANCE_UM:
            return asked
        tolerance = max(tolerance, mpp / 2) * min(4.0, max(1.25, excess**0.8))
        tolerance = min(tolerance, _MAX_TOLERANCE_UM)
        polygons = simplify(polygons, tolerance / mpp)
        found = _Shapes(polygons[index], index, tolerance)
    return found


@contextmanager
def _text(path: Path, compress: bool) -> Iterator[codecs.StreamWriter]:
    with path.open("wb") as raw:
        if not compress:
            yield _WRITER(raw)
            return
        with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
            yield _WRITER(packed)


def _write(
    out: codecs.StreamWriter,
    canvas: Canvas,
    options: PolygonOptions,
    regions: Regions,
    shapes: _Shapes,
) -> tuple[int, int]:
    """Write all features one by one; returns how many, and their vertices."""
    geometries = to_level0(shapes.polygons, canvas.grid.downsample)
    values, areas = regions.values[shapes.chosen], regions.areas_px[shapes.chosen]
    run = _run_identity(canvas, options)
    classes = dict(canvas.classes.values())
    numbers = dict.fromkeys(classes, 0)
    features = vertices = 0
    out.write(OPENING)
    for i in np.lexsort((np.arange(len(areas)), -areas, values)):
        if geometries[i] is None:
            continue
        value = int(values[i])
        numbers[value] += 1
        measurements = {
            "Area um^2": round(float(areas[i]) * canvas.grid.pixel_area_um2, 2),
            "Mean probability": round(float(regions.confidences[shapes.chosen[i]]), 4),
        }
        properties = _properties(canvas, classes[value], numbers[value], measurements)
        identity = uuid.uuid5(
            _NAMESPACE, f"{run}|{value}|{shapely.to_wkb(geometries[i], hex=True)}"
        )
        feature = geojson.Feature(str(identity), _geometry(geometries[i]), properties)
        out.write(",\n" if features else "")
        out.write(geojson.dumps(feature, ensure_ascii=False, separators=_COMPACT))
        features += 1
        vertices += int(shapely.get_num_coordinates(geometries[i]))
    out.write("\n]}\n" if features else "]}\n")
    return features, vertices


def _properties(
    canvas: Canvas, item: TissueClass, number: int, measurements: dict[str, float]
) -> dict[str, Any]:
    """The properties of a feature as QuPath reads them."""
    model = canvas.record.get("model", {})
    return {
        "objectType": "annotation",
        "name": f"{item.name} {number}",
        "isLocked": True,
        "classification": {"name": item.name, "color": list(item.colour)},
        "measurements": measurements,
        "metadata": {
            "wsiseg.version": __version__,
            "wsiseg.model": str(model.get("name", "")),
            "wsiseg.model_sha256": str(model.get("sha256", "")),
        },
    }


def _run_identity(canvas: Canvas, options: PolygonOptions) -> str:
    """What tells one run from another: slide, model, parameters."""
    record = canvas.record
    polygons = asdict(options)
    del polygons["gzip"], polygons["band_px"], polygons["all_classes"]
    settings = record.get("parameters", {})
    parts = [
        record.get("slide", {}).get("quickhash"),
        record.get("model", {}).get("sha256"),
        {k: v for k, v in settings.items() if k not in _SPEED_ONLY},
        polygons,
    ]
    return json.dumps(parts, sort_keys=True, separators=_COMPACT)


def _geometry(geometry: Any) -> dict[str, Any]:
    """A Polygon or MultiPolygon as GeoJSON; whole numbers without decimals."""
    parts = [
        [_positions(shapely.get_coordinates(ring)) for ring in shapely.get_rings(part)]
        for part in shapely.get_parts(geometry)
    ]
    if len(parts) > 1:
        return {"type": "MultiPolygon", "coordinates": parts}
    return {"type": "Polygon", "coordinates": parts[0]}


def _positions(coordinates: npt.NDArray[np.float64]) -> list[list[float]]:
    """Coordinates at 2 decimals, the whole ones as integers."""
    rounded: list[list[float]] = np.round(coordinates, 2).tolist()
    return [[int(v) if v.is_integer() else v for v in pair] for pair in rounded]
