"""Which slides of a folder are annotated, and where. Knows no pixels and no classes of a model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from wsiseg.datasets.annotations import Annotation, read_annotations
from wsiseg.datasets.qupath_config import QuPathConfig, is_region
from wsiseg.datasets.rasterise import has_area
from wsiseg.errors import DatasetError, UsageError

SLIDE_SUFFIXES = (
    *(".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".dcm", ".vms", ".vmu", ".svslide"),
    *(".ome.tif", ".ome.tiff", ".tif", ".tiff", ".btf", ".png", ".jpg", ".jpeg"),
)
PARTS = ("all", "train", "test")
LAYOUT = (
    "a folder with slides and, beside them or in annotations/, GeoJSON files of the same names "
    "(QuPath: File > Export objects as GeoJSON)"
)


_MOST_NAMES = 4


class AnnotatedSlide(NamedTuple):
    """A slide and its annotations as they were read.

    Attributes:
        stem: name of the slide without suffix.
        slide: its file.
        geojson: the file of its annotations.
        annotations: those of the object types wanted that have an area and a class, and where a
            background is wanted annotations without a class.
    """

    stem: str
    slide: Path
    geojson: Path
    annotations: list[Annotation]


def read_folder(root: Path, config: QuPathConfig) -> list[AnnotatedSlide]:
    """Every slide of a folder that has annotations with a class, by name.

    One warning counts what is left out: objects that cannot be painted, files without any,
    slides without a file.

    Raises:
        DatasetError: no such folder; files that do not belong together or cannot be read; no
            slide has annotations with a class, with the same counts.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; expected {LAYOUT}")
    slides: dict[str, list[Path]] = {}
    for path in sorted(p for p in root.iterdir() if p.is_file()):
        stem = _stem(path.name, SLIDE_SUFFIXES)
        if stem and not path.name.startswith("."):
            for name in {stem, path.name, path.stem}:
                slides.setdefault(name, []).append(path)
    found: dict[str, AnnotatedSlide] = {}
    left: dict[str, Counter[str]] = {}
    for geojson in _geojson_files(root):
        name = _stem(geojson.name, (".geojson", ".geojson.gz"))
        slide = _slide_of(geojson, slides.get(name, []))
        stem = _stem(slide.name, SLIDE_SUFFIXES)
        if stem in found:
            raise DatasetError(
                f"{slide}: has two files of annotations, {found[stem].geojson} and {geojson}; "
                "keep one"
            )
        annotations, reasons = _chosen(geojson, config)
        for reason, count in reasons.items():
            left.setdefault(reason, Counter())[geojson.name] += count
        found[stem] = AnnotatedSlide(stem, slide, geojson, annotations)
    result = [found[stem] for stem in sorted(found) if found[stem].annotations]
    bare = {p for paths in slides.values() for p in paths} - {s.slide for s in found.values()}
    notes = [_counted(reason, files) for reason, files in left.items()] + _without(root, bare)
    said = f"left out: {'; '.join(notes)}" if notes else ""
    if not result:
        raise DatasetError(
            f"{root}: no slide has annotations with a class; {said}{'; ' if said else ''}"
            f"expected {LAYOUT}"
        )
    if said:
        warnings.warn(f"{root}: {said}", stacklevel=2)
    return result


def _counted(reason: str, files: Counter[str]) -> str:
    """The total of a reason and the files that it is of."""
    return f"{files.total()} {reason} ({_listed(sorted(files))})"


def _without(root: Path, slides: Set[Path]) -> list[str]:
    """What is to be said of slides without a file of annotations."""
    if not slides:
        return []
    notes = [f"{len(slides)} slides without a GeoJSON file ({_listed(s.name for s in slides)})"]
    stems = {n for s in slides for n in (s.name, s.stem, _stem(s.name, SLIDE_SUFFIXES))}
    folders = [f for f in (root, root / "annotations") if f.is_dir()]
    other = [p for f in folders for p in f.glob("*.json") if p.stem in stems]
    if other:
        notes.append(
            f"files with the suffix .json ({_listed(p.name for p in other)}), which are not read: "
            "name a GeoJSON file SLIDE.geojson"
        )
    return notes


def _listed(names: Iterable[str]) -> str:
    """The first few of some names."""
    names = sorted(names)
    more = f" and {len(names) - _MOST_NAMES} others" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _geojson_files(root: Path) -> list[Path]:
    folders = [f for f in (root, root / "annotations") if f.is_dir()]
    files = [p for f in folders for p in sorted(f.iterdir()) if not p.name.startswith(".")]
    return [p for p in files if p.name.lower().endswith((".geojson", ".geojson.gz"))]


def _stem(name: str, suffixes: Sequence[str]) -> str:
    """The name without the first of the suffixes that it has; "" where it has none."""
    suffix = next((s for s in suffixes if name.lower().endswith(s)), "")
    return name[: -len(suffix)] if suffix else ""


def _slide_of(geojson: Path, slides: list[Path]) -> Path:
    if not slides:
        raise DatasetError(
            f"{geojson}: there is no slide of this name; put the slide into the folder, or take "
            "the file out"
        )
    if len(slides) > 1:
        names = ", ".join(p.name for p in slides)
        raise DatasetError(f"{geojson}: belongs to several slides ({names}); rename one")
    return slides[0]


def _chosen(geojson: Path, config: QuPathConfig) -> tuple[list[Annotation], Counter[str]]:
    """The annotations of a file that can be painted, and how many others there are, by reason.

    Inside a region what is outlined without a class is no background, so it is kept as unlabelled.
    """
    everything = read_annotations(geojson)
    found = [a for a in everything if a.kind in config.objects]
    left = Counter(
        f"objects of type {a.kind}, which are not annotations (option objects)"
        for a in everything
        if a.kind not in config.objects
    )
    chosen, blank = [], []
    for a in found:
        region = is_region(config, a)
        if not any(has_area(rings[0]) for rings in a.polygons):
            left["annotations without area"] += 1
        elif a.class_name or region:
            chosen.append(a)
        else:
            left["annotations without a class"] += 1
            if a.kind == "annotation":
                blank.append(a)
    if not everything:
        left["files without annotations"] += 1
    if not chosen or config.background is None:
        return chosen, left
    return chosen + blank, left


def part_of(
    root: Path, slides: list[AnnotatedSlide], part: str, config: QuPathConfig
) -> list[AnnotatedSlide]:
    """The slides of a part."""
    if part not in PARTS:
        raise UsageError(f"qupath has no part {part!r}; it has {', '.join(PARTS)}")
    stems = [s.stem for s in slides]
    stray = [t for t in config.test if t not in stems]
    if stray:
        raise DatasetError(
            f"{root}: test names {stray[0]}, which is no annotated slide; there are "
            f"{', '.join(stems)}"
        )
    if part == "all":
        return slides
    chosen = [s for s in slides if (s.stem in config.test) == (part == "test")]
    if not chosen:
        raise DatasetError(
            f"{root}: no slide is in the part {part}; name slides for measuring in the option test"
            " and leave some for training"
        )
    return chosen
