"""`wsiseg export`: outputs again from kept canvases, without inference."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsiseg.cli.say import PATH

if TYPE_CHECKING:
    from wsiseg.outputs.files import OutputOptions

SUFFIX = ".canvas"


@click.command("export")
@click.argument("canvases", metavar="CANVAS...", nargs=-1, required=True, type=click.Path())
@click.option("--out", required=True, metavar="DIR", type=PATH, help="Folder.")
@click.option(
    "--min-area", type=float, metavar="UM2", help="Drop smaller regions, fill holes; default 50."
)
@click.option(
    "--tolerance", type=float, metavar="UM", help="Simplify borders; default 1, 0 = pixel edges."
)
@click.option("--all-classes", is_flag=True, help="Export background classes too.")
@click.option(
    "--max-vertices",
    type=int,
    metavar="N",
    help="Simplify further while there are more vertices than this; default 500000.",
)
@click.option("--gzip", is_flag=True, help="Write .geojson.gz.")
@click.option(
    "--compression",
    type=click.Choice(["deflate", "lzw", "zstd"]),
    default="deflate",
    show_default=True,
    help="Of the mask; zstd does not open in every QuPath.",
)
@click.option(
    "--only", metavar="KIND,...", help="Write only some of mask, geojson, overview (and .json)."
)
def command(
    canvases: tuple[str, ...], out: Path, compression: str, only: str | None, **polygons: object
) -> None:
    """Make the outputs of kept canvases (`predict --keep-canvas`) again.

    The files take their names from the canvas: slide.canvas gives slide.geojson and so on.
    """
    from wsiseg.errors import UsageError, WsisegError
    from wsiseg.outputs.files import KINDS, OutputOptions
    from wsiseg.outputs.geojson import PolygonOptions

    renamed = {"min_area": "min_area_um2", "tolerance": "tolerance_um"}
    given = {renamed.get(k, k): v for k, v in polygons.items() if v is not None}
    kinds = tuple(k for w in only.split(",") if (k := w.strip())) if only is not None else KINDS
    options = OutputOptions(PolygonOptions(**given), compression, kinds)  # type: ignore[arg-type]
    paths = [Path(os.path.realpath(path)) for path in canvases]
    twice = [name for name, n in Counter(p.name.casefold() for p in paths).items() if n > 1]
    if twice:
        raise UsageError(f"two canvases are named {twice[0]}; export them to folders of their own")
    failed = 0
    for path in paths:
        try:
            _export(path, out, options)
        except WsisegError as e:
            click.echo(f"wsiseg: error: {e}", err=True)
            failed += 1
    if failed:
        click.echo(f"{failed} of {len(canvases)} failed", err=True)
        raise click.exceptions.Exit(1)


def _export(path: Path, out: Path, options: OutputOptions) -> None:
    """Outputs of one canvas, and a line for each file."""
    from wsiseg.canvas import Canvas
    from wsiseg.errors import CanvasError
    from wsiseg.outputs.canvas_check import damaged_chunks
    from wsiseg.outputs.files import refuse_foreign, write_outputs

    if not (path / "zarr.json").is_file():
        raise CanvasError(
            f"{path}: not a readable wsiseg canvas; give the STEM.canvas folders of wsiseg predict"
            " --keep-canvas"
        )
    with _locked(path):
        canvas = Canvas.open(path)
        if "status" not in canvas.record:
            raise CanvasError(f"{path}: the canvas is incomplete; finish it with wsiseg predict")
        if damaged := damaged_chunks(canvas):
            raise CanvasError(
                f"{path}: {damaged} of its chunks are damaged or missing; make it again with"
                " wsiseg predict --overwrite --keep-canvas"
            )
        stem = path.name.removesuffix(SUFFIX)
        refuse_foreign(out, stem)
        written = write_outputs(canvas, out, stem, options)
    polygons = written.polygons or {}
    if polygons.get("tolerance_raised") or not polygons.get("within_budget", True):
        used = "simplified to" if polygons["tolerance_raised"] else "stay at"
        used += f" {polygons['tolerance_um']:g} um, {polygons['vertices']} vertices"
        used += "" if polygons["within_budget"] else ", still over --max-vertices"
        click.echo(f"wsiseg: warning: {path}: polygons {used}", err=True)
    for file in written.paths:
        click.echo(str(file))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep a canvas from `predict`, which may remove or remake it while it is read."""
    from wsiseg.errors import CanvasError
    from wsiseg.lease import Locks

    locks, lock = Locks(), path.with_name(f"{path.name.removesuffix(SUFFIX)}.lock")
    with ExitStack() as held:
        with suppress(OSError):  # a folder that cannot be written: nobody is at work there
            lease = locks.settle(lock)
            if lease is None:
                raise CanvasError(
                    f"{path}: {locks.holder(lock)[0]} is at work on it; export it afterwards"
                )
            held.enter_context(lease)
        yield
