"""Hostile GeoJSON: absurd and missing numbers, deep nesting, names, and bombs of gzip."""

from __future__ import annotations

import copy
import gzip
import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_bytes import damage
from fuzz_case import Case
from PIL import Image

from wsiseg.datasets.annotations import read_annotations
from wsiseg.datasets.qupath import QuPathDataset
from wsiseg.datasets.qupath_config import QuPathConfig

ODD: tuple[Any, ...] = (
    *(None, True, "", "x", [], {}, [[]], [[[]]], -1, 0, 1e308, -1e308, float("nan"), float("inf")),
    *(10**18, 10**400, "9" * 3000, "../../etc/passwd", "a\nb", "\x1b[2J", "a:b", "Tumor*", "\0"),
    *([None], [1], {"a": 1}, "Polygon", "GeometryCollection", "MultiPolygon", "é" * 500),
)
_MOST = 2_000_000
"""Characters of something that is repeated."""
RING = [[10, 10], [90, 10], [90, 60], [10, 60], [10, 10]]


class Maker:
    """Makes annotations of a small slide from good ones."""

    def __init__(self, seeds: Path) -> None:
        Image.fromarray(np.full((80, 120, 3), 200, np.uint8)).save(seeds / "slide.png")
        self.png = (seeds / "slide.png").read_bytes()
        self.bomb = gzip.compress(bytes(1 << 24), 1) * 40
        self.config = QuPathConfig(mpp=1.0, patch_px=32, mpp_override=1.0)

    def make(self, rng: random.Random, folder: Path) -> Case:
        """A slide and its annotations."""
        roll, packed = rng.random(), rng.random() < 0.2
        if roll < 0.01:
            return self._try(folder, "slide.geojson.gz", self.bomb, "gzip bomb", rng)
        if roll < 0.1:
            text, what = _nested(rng), "nesting"
        else:
            data = copy.deepcopy(_collection())
            what = ", ".join(_change(data, rng) for _ in range(rng.choice((1, 1, 2, 4))))
            text = json.dumps(data)
        content = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.2:
            content, what = damage(content, rng), f"{what}, damaged bytes"
        if packed:
            content = gzip.compress(content, 1)
            content = damage(content, rng) if rng.random() < 0.5 else content
        return self._try(folder, "slide.geojson" + ".gz" * packed, content, what, rng)

    def _try(self, folder: Path, name: str, content: bytes, what: str, rng: random.Random) -> Case:
        path = folder / name
        path.write_bytes(content)
        (folder / "slide.png").write_bytes(self.png)
        if rng.random() < 0.3:
            return Case(f"read, {what}", lambda: _read(path))
        return Case(what, lambda: self._open(folder))

    def _open(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = QuPathDataset(folder, "train", self.config)
        for index in range(min(3, len(dataset))):
            dataset[index]


def _read(path: Path) -> None:
    read_annotations(path)


def _feature(name: str, geometry: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "Feature",
        "id": "b1",
        "geometry": geometry,
        "properties": {
            "objectType": "annotation",
            "name": "one",
            "classification": {"name": name, "color": [200, 0, 0]},
        },
    }


def _collection() -> dict[str, Any]:
    two = [[[[x + 5, y + 5] for x, y in RING]]]
    parts = [{"type": "Polygon", "coordinates": [RING]}]
    features = [
        _feature("Tumor", {"type": "Polygon", "coordinates": [RING]}),
        _feature("Stroma", {"type": "MultiPolygon", "coordinates": two}),
        _feature("Stroma", {"type": "GeometryCollection", "geometries": parts}),
    ]
    return {"type": "FeatureCollection", "features": features}


def _change(data: Any, rng: random.Random) -> str:
    """Replace, remove or repeat something anywhere in the data."""
    whole: Any = {"all": data}
    node, key = whole, "all"
    while True:
        child = node[key]
        leaf = not isinstance(child, dict | list) or not child
        if leaf or (node is not whole and rng.random() < 0.12):
            break
        node = child
        key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
    if rng.random() < 0.15:
        del node[key]
        return f"without {key}"
    count = rng.choice((2, 50, 3000))
    if rng.random() < 0.2 and len(str(child)) * count < _MOST:
        node[key] = [child] * count
    else:
        node[key] = copy.deepcopy(rng.choice(ODD))
    return f"{key} = {str(node[key])[:40]!r}"


def _nested(rng: random.Random) -> str:
    """Collections, lists or names in one another, as deep as JSON is read and deeper."""
    depth = rng.choice((50, 300, 450, 480, 495, 900, 2000, 10**5))
    inner = '{"type":"Polygon","coordinates":[[[1,1],[9,1],[9,9]]]}'
    lists = "[" * depth + "]" * depth
    collections = '{"type":"GeometryCollection","geometries":[' * depth + inner + "]}" * depth
    geometry = rng.choice((collections, '{"type":"Polygon","coordinates":' + lists + "}", inner))
    name = rng.choice(('"a"', lists, '{"a":' * depth + "1" + "}" * depth))
    return (
        '{"type":"Feature","geometry":'
        + geometry
        + ',"properties":{"name":'
        + name
        + ',"classification":{"name":'
        + name
        + "}}}"
    )
