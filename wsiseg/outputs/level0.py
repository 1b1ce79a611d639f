"""Polygons brought from the pixels of a canvas to those of its slide. Knows no files."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import shapely

GRID_PX = 0.01
"""Coordinates are multiples of this many level-0 pixels."""


def to_level0(
    polygons: npt.NDArray[np.object_], downsample: tuple[float, float]
) -> npt.NDArray[np.object_]:
    """Polygons in grid pixels as valid polygons in level-0 pixels at 2 decimals.

    An entry without area left is None; one that falls apart is a MultiPolygon. Every other
    entry passes the precision reducer with which QuPath reads it.
    """
    scaled = shapely.transform(polygons, lambda xy: xy * np.asarray(downsample))
    bad = ~shapely.is_valid(scaled)
    scaled[bad] = shapely.make_valid(scaled[bad], method="structure", keep_collapsed=False)
    snapped = shapely.orient_polygons(shapely.set_precision(scaled, GRID_PX))
    areal = np.isin(
        shapely.get_type_id(snapped),
        (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON),
    )
    result = np.full(len(snapped), None, object)
    keep = areal & ~shapely.is_empty(snapped)
    result[keep] = snapped[keep]
    return result
