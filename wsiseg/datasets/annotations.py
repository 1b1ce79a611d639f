"""Reads the GeoJSON that QuPath exports. Knows no slides, no classes of a model, no pixels.

Read are a FeatureCollection, a list of features or one feature, as .geojson or .geojson.gz, with
the properties of QuPath 0.3 and later (`objectType`, `classification` with `name` or `names` and
`color`) or those before (`id: PathAnnotationObject`, `classification` with `colorRGB`).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsiseg.classes import Colour
from wsiseg.errors import DatasetError

_MAX_BYTES = 1 << 29
"""Of the text of a file, unpacked. As JSON it takes ten times as much memory."""
F64 = npt.NDArray[np.float64]
Rings = tuple[F64, ...]


@dataclass(frozen=True)
class Annotation:
    """A feature of a GeoJSON file.

    Attributes:
        number: its place in the file, from 1.
        kind: annotation, detection, cell or tile.
        label: its own name, "" where it has none.
        class_name: its class, "" where it has none.
        colour: of the class, None where the file does not say.
        polygons: shell and holes of each part, (n, 2) float64 x, y; empty for lines and points.
    """

    number: int
    kind: str
    label: str
    class_name: str
    colour: Colour | None
    polygons: tuple[Rings, ...]


def read_annotations(path: Path) -> list[Annotation]:
    """The features of a GeoJSON file, in its order; empty where it has none.

    Raises:
        DatasetError: it cannot be read, is not GeoJSON, or holds coordinates that are no finite
            numbers.
    """
    features = _features(path, _load(path))
    return [_annotation(path, number, f) for number, f in enumerate(features, start=1)]


def _load(path: Path) -> Any:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) <= _MAX_BYTES:
            return json.loads(data.decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error) as e:
        raise DatasetError(f"{path}: cannot be read ({e})") from e
    except MemoryError as e:
        raise DatasetError(f"{path}: does not fit into memory; export fewer objects") from e
    except (ValueError, RecursionError) as e:
        raise DatasetError(
            f"{path}: not JSON ({e}); export the annotations from QuPath as GeoJSON again"
        ) from e
    raise DatasetError(f"{path}: over {_MAX_BYTES >> 20} MiB of text; export fewer objects")


def _features(path: Path, data: Any) -> list[Any]:
    if isinstance(data, Mapping) and data.get("type") == "FeatureCollection":
        data = data.get("features")
    elif isinstance(data, Mapping) and data.get("type") == "Feature":
        data = [data]
    if not isinstance(data, list) or not all(isinstance(f, Mapping) for f in data):
        raise DatasetError(
            f"{path}: not GeoJSON; expected a FeatureCollection, a list of features or a Feature"
        )
    return data


def _annotation(path: Path, number: int, feature: Mapping[str, Any]) -> Annotation:
    properties = feature.get("properties") or {}
    geometry = feature.get("geometry") or {}
    if not isinstance(properties, Mapping) or not isinstance(geometry, Mapping):
        raise DatasetError(f"{path}: feature {number} is not a GeoJSON feature")
    old = _text(feature.get("id")).removeprefix("Path").removesuffix("Object").lower()
    kind = properties.get("objectType") or (
        old if old in ("detection", "cell", "tile") else "annotation"
    )
    name, colour = _classification(properties.get("classification"))
    try:
        polygons = tuple(_polygons(geometry))
    except (TypeError, ValueError, LookupError, OverflowError, AttributeError) as e:
        raise DatasetError(f"{path}: feature {number} has coordinates that cannot be ({e})") from e
    except RecursionError as e:
        raise DatasetError(f"{path}: feature {number} is nested too deeply") from e
    label = _text(properties.get("name"))
    return Annotation(number, _text(kind), label, name, colour, polygons)


def _classification(value: Any) -> tuple[str, Colour | None]:
    """(name, colour) of a classification in any form that QuPath has written."""
    if not isinstance(value, Mapping):
        return _text(value), None
    names = value.get("names")
    name = ": ".join(map(_text, names)) if isinstance(names, list) else _text(value.get("name"))
    colour, packed = value.get("color"), value.get("colorRGB")
    if isinstance(packed, int) and not isinstance(colour, list):
        colour = [packed >> 16 & 255, packed >> 8 & 255, packed & 255]
    if isinstance(colour, list) and len(colour) >= 3 and all(_is_byte(c) for c in colour[:3]):
        return name.strip(), (colour[0], colour[1], colour[2])
    return name.strip(), None


def _text(value: Any) -> str:
    """A text or number without the space around it; "" of anything else, which is no name."""
    return str(value).strip() if isinstance(value, str | int | float) and value else ""


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= 255


def _polygons(geometry: Mapping[str, Any]) -> Iterator[Rings]:
    """The polygons of a geometry; none of points and lines."""
    kind = geometry.get("type")
    if kind == "Polygon":
        yield _rings(geometry["coordinates"])
    elif kind == "MultiPolygon":
        for part in geometry["coordinates"]:
            yield _rings(part)
    elif kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _polygons(part)


def _rings(coordinates: Any) -> Rings:
    rings = tuple(np.array([[p[0], p[1]] for p in ring], np.float64) for ring in coordinates)
    if not rings or any(ring.ndim != 2 or len(ring) < 3 for ring in rings):
        raise ValueError("a ring needs at least 3 positions of x and y")
    if not all(np.isfinite(ring).all() for ring in rings):
        raise ValueError("not a finite number")
    return rings
