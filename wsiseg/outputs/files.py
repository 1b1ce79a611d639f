"""All output files of one canvas, complete or not at all. Knows names, not formats."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shapely.errors import ShapelyError

from wsiseg.atomic import staged
from wsiseg.canvas import Canvas
from wsiseg.errors import OutputError, UsageError
from wsiseg.outputs import geojson, sidecar
from wsiseg.outputs.geojson import PolygonOptions, write_geojson
from wsiseg.outputs.overview import write_overview
from wsiseg.outputs.polygons import Regions
from wsiseg.outputs.pyramid import write_pyramid
from wsiseg.outputs.sidecar import ClassArea, class_areas, write_sidecar

KINDS = ("mask", "geojson", "overview")
"""What can be written besides the sidecar, which always is."""


@dataclass(frozen=True)
class OutputOptions:
    """What to write and how.

    Attributes:
        polygons: see `PolygonOptions`.
        compression: of the mask: deflate, lzw or zstd.
        kinds: which of `KINDS` to write.
    """

    polygons: PolygonOptions = field(default_factory=PolygonOptions)
    compression: str = "deflate"
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        unknown = [k for k in self.kinds if k not in KINDS]
        if unknown or not self.kinds:
            named = ", ".join(unknown) or "of no kind"
            raise UsageError(f"outputs {named}: choose from {', '.join(KINDS)}")


@dataclass(frozen=True)
class OutputFiles:
    """What was written.

    Attributes:
        paths: the files, the sidecar last.
        areas: area of each class, for a summary.
        polygons: options and report of the GeoJSON, None where it was not written.
    """

    paths: list[Path]
    areas: list[ClassArea]
    polygons: dict[str, Any] | None


def output_names(stem: str, *, gzip: bool = False) -> dict[str, str]:
    """Kind to file name, with the sidecar as `json`."""
    return {
        "mask": f"{stem}.mask.ome.tif",
        "geojson": f"{stem}.geojson{'.gz' if gzip else ''}",
        "overview": f"{stem}.overview.png",
        "json": f"{stem}.json",
    }


def complete_outputs(folder: str | Path, stem: str) -> dict[str, Any] | None:
    """The sidecar of outputs of which every file that it names is there; else None."""
    folder = Path(folder)
    sidecar = _read_sidecar(folder / output_names(stem)["json"])
    files = sidecar.get("files")
    whole = isinstance(files, dict) and all((folder / str(f)).is_file() for f in files.values())
    return sidecar if whole else None


def refuse_foreign(folder: Path, stem: str) -> None:
    """Make sure that no file of somebody else has a name of the outputs.

    GeoJSON and JSON files beside a slide may hold a person's annotations: those that wsiseg did
    not write as they are, corrected ones among them, are not overwritten unasked.

    Raises:
        OutputError: there is such a file.
    """
    for name, opening in (
        (f"{stem}.geojson", geojson.OPENING),
        (f"{stem}.geojson.gz", geojson.OPENING),
        (f"{stem}.json", sidecar.OPENING),
    ):
        path = folder / name
        if path.is_file() and not _begins(path, opening.encode()):
            raise OutputError(
                f"{path}: is not as wsiseg writes it, perhaps annotations of your own; move it, or"
                " choose another folder for the outputs"
            )


def _begins(path: Path, opening: bytes) -> bool:
    """Whether a file, unpacked if it is .gz, begins so, or is empty."""
    try:
        if path.suffix != ".gz":
            with path.open("rb") as file:
                return file.read(len(opening)) in (opening, b"")
        with gzip.open(path) as packed:
            return packed.read(len(opening)) in (opening, b"")
    except (OSError, EOFError, zlib.error):
        return False


def write_outputs(
    canvas: Canvas,
    folder: str | Path,
    stem: str,
    options: OutputOptions | None = None,
    *,
    check: Callable[[], None] | None = None,
    regions: Callable[[], Regions | None] = lambda: None,
) -> OutputFiles:
    """Write mask, polygons, overview and sidecar of a canvas as `<folder>/<stem>.*`.

    All are written under temporary names and renamed at the end, the sidecar last: where it is,
    the outputs are complete. On any failure the temporary files are removed and what was there
    before stays. Several processes that may write the same files take a lock and give `check`, see
    `staged`. `regions` gives those that were traced already with the same options, if they were.
    Files of others under these names are replaced, see `refuse_foreign`.

    Raises:
        OutputError: they cannot be made or written, or some of another slide or model would stay.
    """
    options = options or OutputOptions()
    folder = Path(folder)
    names = output_names(stem, gzip=options.polygons.gzip)
    kinds = [k for k in KINDS if k in options.kinds]
    finals = [folder / names[k] for k in (*kinds, "json")]
    old = _read_sidecar(finals[-1])
    kept = _kept(folder, old, kinds)
    if kept and _who(old) != _who(canvas.record):
        raise OutputError(
            f"{finals[-1]}: tells of another slide, model or setting; choose another folder, or"
            " have all files written anew"
        )
    areas = class_areas(canvas)
    polygons: dict[str, Any] | None = None
    stale = [finals[-1]]  # while files are replaced, nothing is complete
    if "geojson" in kinds:
        stale.append(folder / output_names(stem, gzip=not options.polygons.gzip)["geojson"])
    with staged(*finals, stale=stale, check=check) as temporaries:
        at = dict(zip((*kinds, "json"), temporaries, strict=True))
        if "mask" in at:
            write_pyramid(at["mask"], canvas, compression=options.compression)
        if "geojson" in at:
            with _geometry_told(folder / names["geojson"]):
                report = write_geojson(at["geojson"], canvas, options.polygons, regions=regions())
            polygons = {"options": asdict(options.polygons), **asdict(report)}
        if "overview" in at:
            write_overview(at["overview"], canvas, areas=areas)
        write_sidecar(
            at["json"],
            canvas,
            areas=areas,
            files={**kept, **{k: names[k] for k in kinds}},
            polygons=polygons if "geojson" in kinds else old.get("polygons"),
        )
    return OutputFiles(finals, areas, polygons)


@contextmanager
def _geometry_told(path: Path) -> Iterator[None]:
    """Tell of which file the polygons are that the library of geometry gave up on.

    Raises:
        OutputError: it did.
    """
    try:
        yield
    except ShapelyError as e:
        reason = " ".join(str(e).split())
        raise OutputError(
            f"{path}: the polygons cannot be made ({type(e).__name__}: {reason}); start the same"
            " command again with another --tolerance, or make the other files of the canvas with"
            " wsiseg export --only mask,overview"
        ) from e


def _kept(folder: Path, old: dict[str, Any], kinds: list[str]) -> dict[str, str]:
    """Files of an earlier run that stay as they are."""
    files = old.get("files")
    if not isinstance(files, dict):
        return {}
    return {
        k: str(f)
        for k, f in files.items()
        if k in KINDS and k not in kinds and (folder / str(f)).is_file()
    }


_SAME = {
    "slide": ("quickhash", "size"),
    "model": ("sha256",),
    "parameters": ("mpp", "window_px", "overlap_px", "seed", "tta", "tissue", "tissue_sha256"),
}
"""What files that stand side by side must have been made of, as a record tells it."""


def _who(record: Mapping[str, Any]) -> list[Any]:
    """Slide, model and settings of a record or sidecar, as far as they are told."""
    parts = {name: record.get(name) for name in _SAME}
    return [
        part.get(key) if isinstance(part, Mapping) else None
        for name, part in parts.items()
        for key in _SAME[name]
    ]


def _read_sidecar(path: Path) -> dict[str, Any]:
    """The content of a sidecar; empty where there is none or it cannot be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
