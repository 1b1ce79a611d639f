"""Reads back what predictions left in a folder. Knows no pixels, and trusts no file's content."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsiseg.classes import Classes
from wsiseg.errors import ConfigError, UsageError

BESIDE = (".mask.ome.tif", ".geojson", ".geojson.gz", ".overview.png")
"""Endings of files that lie beside a record."""
SUMMARY = "summary.csv"
MAX_SIDECAR_BYTES = 16 << 20
_CANVAS = ".canvas"


@dataclass(frozen=True)
class SlideResult:
    """One slide of a run. What is not known is None or empty.

    Attributes:
        stem: name of its outputs without suffix.
        slide: file name of the slide.
        status: "ok", "no tissue", "failed", "incomplete", "damaged" or what the record says.
        error: why it is not ok, in one line.
        quickhash: of the slide.
        size: (width, height) of the slide's frame in level-0 pixels.
        mpp: micrometres per level-0 pixel.
        mask_mpp: (x, y) micrometres per pixel of the mask.
        mask_size: (width, height) of the mask.
        frame: "qupath" or "openslide", see `open_slide`.
        backend: library that read the slide.
        classes: of the labels.
        areas_mm2: square millimetres by class.
        objects: their number by class, None where the model makes none.
        model: its name.
        model_sha256: its digest.
        licence: terms of the model.
        tissue: where it was looked: auto, none or the name of a mask file.
        seconds: that the analysis took.
        files: the output files that are there, by kind (mask, geojson, overview).
    """

    stem: str
    slide: str = ""
    status: str = "damaged"
    error: str = ""
    quickhash: str = ""
    size: tuple[int, int] | None = None
    mpp: float | None = None
    mask_mpp: tuple[float, float] | None = None
    mask_size: tuple[int, int] | None = None
    frame: str = "qupath"
    backend: str = ""
    classes: Classes | None = None
    areas_mm2: Mapping[str, float] = field(default_factory=dict)
    objects: Mapping[str, int] | None = None
    model: str = ""
    model_sha256: str = ""
    licence: str = ""
    tissue: str = ""
    seconds: float | None = None
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def analysed_mm2(self) -> float | None:
        """Area of all classes together, None where no area is known."""
        return sum(self.areas_mm2.values()) if self.areas_mm2 else None


def read_run(folder: str | Path) -> list[SlideResult]:
    """All slides of a run's folder, in the order of their names.

    Slides are known from their sidecars; those that have none from `summary.csv`, where there is
    one, and from canvases that were left behind. What failed by that table is a result of its own,
    also beside the outputs of an earlier run or of another slide of that name.

    Raises:
        UsageError: the folder is missing, cannot be listed or holds no result.
    """
    folder = Path(folder)
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError as e:
        raise UsageError(
            f"{folder}: cannot be listed ({e.strerror}); give a folder of outputs"
        ) from e
    sidecars = [n for n in names if n.endswith(".json") and not n.startswith(".")]
    found = {r.stem: r for n in sidecars if (r := _read(folder, n))}
    failed = []
    for result in (*_from_summary(folder / SUMMARY), *_from_canvases(names)):
        if result.status == "failed" and result.stem in found:
            failed.append(result)
        found.setdefault(result.stem, result)
    if not found:
        raise UsageError(f"{folder}: no outputs of wsiseg predict in this folder")
    return sorted([*found.values(), *failed], key=lambda r: (r.stem.casefold(), r.stem))


def _read(folder: Path, name: str) -> SlideResult | None:
    """The result of a sidecar; None for another JSON file."""
    stem, path = name.removesuffix(".json"), folder / name
    beside = any(_is_file(folder / f"{stem}{end}") for end in BESIDE)
    try:
        if not path.is_file() or path.stat().st_size > MAX_SIDECAR_BYTES:
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        reason = " ".join(str(e).split())
        return SlideResult(stem, error=f"{name} cannot be read ({reason})") if beside else None
    if not isinstance(data, dict) or not isinstance(data.get("slide"), dict):
        return SlideResult(stem, error=f"{name} is no record of wsiseg") if beside else None
    return _result(folder, stem, data)


def _result(folder: Path, stem: str, data: dict[str, Any]) -> SlideResult:
    slide, model, mask = (_mapping(data.get(k)) for k in ("slide", "model", "mask"))
    classes, error = _classes(data.get("classes"))
    objects = data.get("objects")
    counts = {str(k): _number(v) for k, v in _mapping(objects).items()}
    areas = {str(k): _number(v) for k, v in _mapping(data.get("areas_mm2")).items()}
    files, missing = _files(folder, _mapping(data.get("files")))
    error = error or (f"missing: {', '.join(missing)}" if missing else "")
    return SlideResult(
        stem,
        slide=_text(slide.get("path")),
        status="damaged" if error else _text(data.get("status")) or "ok",
        error=error,
        quickhash=_text(slide.get("quickhash")),
        size=_size(slide.get("size")),
        mpp=_number(slide.get("mpp")),
        mask_mpp=_pair(mask.get("mpp")),
        mask_size=_size(mask.get("size")),
        frame="openslide" if slide.get("frame") == "openslide" else "qupath",
        backend=_text(slide.get("backend")),
        classes=classes,
        areas_mm2={k: v for k, v in areas.items() if v is not None},
        objects={k: int(v) for k, v in counts.items() if v is not None}
        if isinstance(objects, dict)
        else None,
        model=_text(model.get("name")),
        model_sha256=_text(model.get("sha256")),
        licence=_text(model.get("licence")),
        tissue=_text(_mapping(data.get("parameters")).get("tissue")),
        seconds=_number(_mapping(data.get("timings")).get("total")),
        files=files,
    )


def _from_summary(path: Path) -> list[SlideResult]:
    """Slides of a run's table; none where it is missing or unreadable."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return []
    results = []
    for row in rows:
        name = Path(row.get("path") or row.get("slide") or row.get("stem") or "").name
        stem = row.get("stem") or Path(name).stem
        status = row.get("status") or "failed"
        if stem:
            error = " ".join((row.get("error") or "").split())
            if status in ("ok", "no tissue"):  # those whose record is there are known already
                status, error = "damaged", f"missing: {stem}.json"
            seconds = _number(row.get("seconds"))
            results.append(SlideResult(stem, name, status, error, seconds=seconds))
    return results


def _from_canvases(names: list[str]) -> list[SlideResult]:
    """Canvases that were left behind by runs that did not end."""
    text = "the run has not ended, or was interrupted: start it again"
    return [
        SlideResult(n.removesuffix(_CANVAS), status="incomplete", error=text)
        for n in names
        if n.endswith(_CANVAS) and not n.startswith(".")
    ]


def _files(folder: Path, named: Mapping[str, Any]) -> tuple[dict[str, Path], list[str]]:
    """The named files that are there, which must lie in the folder itself; and the others."""
    there, missing = {}, []
    for kind, name in named.items():
        plain = isinstance(name, str) and Path(name).name == name and "\0" not in name
        if plain and _is_file(folder / name):
            there[str(kind)] = folder / name
        else:
            missing.append(str(name))
    return there, missing


def _is_file(path: Path) -> bool:
    """Whether a file is there; no for names that cannot be, and folders that cannot be entered."""
    try:
        return path.is_file()
    except OSError:
        return False


def _classes(rows: Any) -> tuple[Classes | None, str]:
    try:
        return Classes.from_list(rows if isinstance(rows, list) else []), ""
    except (ConfigError, OverflowError) as e:
        return None, f"its classes cannot be read ({e})"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    """A finite number of 0 or more, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _pair(value: Any) -> tuple[float, float] | None:
    """Two positive numbers, or None."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    x, y = _number(value[0]), _number(value[1])
    return (x, y) if x and y else None


def _size(value: Any) -> tuple[int, int] | None:
    pair = _pair(value)
    return None if pair is None else (int(pair[0]), int(pair[1]))
