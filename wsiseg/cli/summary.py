"""What `wsiseg predict` says of a finished slide. Knows no pixels."""

from __future__ import annotations

from wsiseg.canvas import Canvas
from wsiseg.cli.progress import format_seconds
from wsiseg.outputs.files import OutputFiles


def summary(canvas: Canvas, written: OutputFiles, *, seconds: float) -> str:
    """What was found and written, a line each."""
    folder, stem = written.paths[0].parent, canvas.path.stem
    timings = canvas.record["timings"]
    speed = f"{timings['tiles']} tiles at {timings['tiles_per_s']:.1f} tiles/s"
    if canvas.record["status"] == "no tissue":
        lines = [f"{stem}: no tissue found, so the outputs are empty"]
        lines.append("  --tissue none analyses the whole slide, --tissue FILE what is white there")
    else:
        lines = [f"{stem}: {format_seconds(seconds)}, {speed}"]
    lines += [f"  {a.name:<24} {a.mm2:12.4f} mm2 {a.percent:6.1f}%" for a in written.areas]
    polygons = written.polygons or {}
    if polygons.get("dropped_small"):
        least = polygons["options"]["min_area_um2"]
        small = f"{polygons['dropped_small']} regions under {least:g} um2"
        lines.append(f"  {small} are in the mask only, not among the polygons (--min-area)")
    if polygons.get("tolerance_raised"):
        lines.append(
            f"  polygons simplified to {polygons['tolerance_um']:g} um, fewer for QuPath to hold"
        )
    if not polygons.get("within_budget", True):
        many = f"{polygons['vertices']} vertices of polygons are many for QuPath"
        lines.append(f"  {many} to hold; a larger --min-area leaves fewer")
    lines.append(f"  wrote {', '.join(p.name for p in written.paths)} to {folder}")
    return "\n".join(lines)
