"""What `wsiseg predict` warns of a slide before and after it is worked on."""

from __future__ import annotations

from pathlib import Path

from wsiseg.canvas import Canvas
from wsiseg.cli.say import say
from wsiseg.models.segmenter import ModelInfo
from wsiseg.slides.slide import COARSE, Slide


def warn_of_slide(slide: Slide, path: Path, model: ModelInfo) -> None:
    """Say what is known to be wrong with a slide, and whether it is too coarse for a model."""
    lines = list(slide.warnings)
    if slide.mpp > COARSE * model.mpp:
        lines.append(
            f"{slide.mpp:.4g} um per pixel is too coarse for model {model.name}, which sees "
            f"{model.mpp:g}: the result will mean little"
        )
    for line in lines:
        say(f"wsiseg: warning: {path}: {line}", err=True)


def warn_of_stain(canvas: Canvas, path: Path) -> None:
    """Say where a model's stain normalisation could not be done."""
    if canvas.record["status"] == "ok" and (
        canvas.record["parameters"].get("stain_matrix", ()) is None
    ):
        say(
            f"wsiseg: warning: {path}: too little tissue, or stains unlike H&E: not "
            "normalised to the model's stains",
            err=True,
        )
