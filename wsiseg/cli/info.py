"""`wsiseg info`: what is known of a slide. Knows words, not pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsiseg.cli.say import PATH

if TYPE_CHECKING:
    from wsiseg.slides import Slide

_STAND_IN_MPP = 0.5


@click.command("info")
@click.argument("slide", type=PATH)
@click.option("--mpp", type=float, help="Micrometres per pixel, over what the slide states.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "openslide", "direct", "tiffslide"]),
    default="auto",
    show_default=True,
    help="Library that reads the slide.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(slide: Path, mpp: float | None, backend: str, as_json: bool) -> None:
    """Show what is known of SLIDE: format, size, resolution, levels and tissue."""
    from wsiseg.errors import ResolutionError
    from wsiseg.slides import open_slide

    hint = None
    try:
        source = open_slide(slide, backend=backend, mpp=mpp)
    except ResolutionError as e:
        if mpp is not None:
            raise
        hint = str(e)
        source = open_slide(slide, backend=backend, mpp=_STAND_IN_MPP)
    with source:
        record = _record(source, hint)
    click.echo(json.dumps(record, indent=2) if as_json else _text(record))


def _record(slide: Slide, hint: str | None) -> dict[str, Any]:
    """Everything that is printed, ready for JSON; areas and mpp null where mpp is unknown, tissue
    where it cannot be looked for."""
    from wsiseg.errors import SlideError, SlideReadError
    from wsiseg.slides.tissue import find_tissue

    notes = [hint] if hint else list(slide.warnings)
    try:
        tissue = find_tissue(slide, "auto")
    except SlideReadError:
        raise
    except SlideError as e:
        tissue = None
        notes.append(str(e))
    levels = [
        {"size": list(size), "downsample": downsample}
        for size, downsample in zip(slide.level_sizes, slide.level_downsamples, strict=True)
    ]
    return {
        "path": str(slide.path),
        "vendor": slide.vendor,
        "backend": slide.backend,
        "size": list(slide.size),
        "frame": slide.frame,
        "bounds": None if slide.bounds is None else list(slide.bounds),
        "mpp": None if hint else slide.mpp,
        "mpp_source": None if hint else slide.mpp_source,
        "objective_power": slide.objective_power,
        "levels": levels,
        "associated_images": {name: list(size) for name, size in slide.associated.items()},
        "tissue_fraction": tissue and tissue.fraction,
        "tissue_mm2": None if hint or tissue is None else tissue.area_mm2,
        "quickhash": slide.quickhash,
        "warnings": notes,
    }


def _text(record: dict[str, Any]) -> str:
    """The record for people."""
    width, height = record["size"]
    mpp, power, bounds = record["mpp"], record["objective_power"], record["bounds"]
    extent = f" ({width * mpp / 1000:.2f} x {height * mpp / 1000:.2f} mm)" if mpp else ""
    area, share = record["tissue_mm2"], record["tissue_fraction"]
    tissue = "unknown"
    if share is not None:
        tissue = f"{share:.1%}" + ("" if mpp else f" (as if at {_STAND_IN_MPP:g} um per pixel)")
    images = [f"{name} {w} x {h}" for name, (w, h) in record["associated_images"].items()]
    lines = [
        ("slide", record["path"]),
        ("format", f"{record['vendor']}, read with {record['backend']}"),
        ("size", f"{width} x {height} px{extent}"),
        ("bounds", "none" if bounds is None else "x {} y {}, {} x {} px".format(*bounds)),
        ("mpp", f"{mpp:g} um per pixel (from {record['mpp_source']})" if mpp else "unknown"),
        ("objective", f"{power:g}x" if power else "unknown"),
    ]
    for number, level in enumerate(record["levels"]):
        (w, h), downsample = level["size"], level["downsample"]
        lines.append((f"level {number}", f"{w} x {h} px, downsample {downsample:.6g}"))
    lines += [
        ("tissue", tissue if area is None else f"{tissue} ({area:.2f} mm2)"),
        ("images", ", ".join(images) or "none"),
        ("quickhash", record["quickhash"]),
    ]
    lines += [("note", text) for text in record["warnings"]]
    return "\n".join(f"{name:<10} {value}" for name, value in lines)
