"""Which slides of a folder are annotated, and where. Knows no pixels and no classes of a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from wsiseg.datasets.annotations import Annotation, read_annotations
from wsiseg.datasets.qupath_config import QuPathConfig, is_region
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

    Slides without GeoJSON are passed over; GeoJSON without annotations is warned of.
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
    for geojson in _geojson_files(root):
        name = _stem(geojson.name, (".geojson", ".geojson.gz"))
        slide = _slide_of(geojson, slides.get(name, []))
        stem = _stem(slide.name, SLIDE_SUFFIXES)
        if stem in found:
            raise DatasetError(
                f"{slide}: has two files of annotations, {found[stem].geojson} and {geojson}; "
                "keep one"
            )
        annotations = _chosen(geojson, config)
        found[stem] = AnnotatedSlide(stem, slide, geojson, annotations)
    result = [found[stem] for stem in sorted(found) if found[stem].annotations]
    if not result:
        raise DatasetError(f"{root}: no slide has annotations with a class; expected {LAYOUT}")
    return result


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


def _chosen(geojson: Path, config: QuPathConfig) -> list[Annotation]:
    """The annotations of a file that can be painted; one warning for those that cannot.

    Inside a region what is outlined without a class is no background, so it is kept as unlabelled.
    """
    found = [a for a in read_annotations(geojson) if a.kind in config.objects]
    chosen = [a for a in found if a.polygons and (a.class_name or is_region(config, a))]
    if not found:
        warnings.warn(f"{geojson}: has no annotations", stacklevel=2)
    elif len(chosen) < len(found):
        warnings.warn(
            f"{geojson}: {len(found) - len(chosen)} of {len(found)} annotations have no class or "
            "no area and are left out",
            stacklevel=2,
        )
    if not chosen or config.background is None:
        return chosen
    blank = [a for a in found if a.polygons and not a.class_name and a.kind == "annotation"]
    return chosen + [a for a in blank if not is_region(config, a)]


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
