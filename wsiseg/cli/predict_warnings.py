"""What `wsiseg predict` warns of a slide before and after it is worked on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from wsiseg.canvas import Canvas
from wsiseg.cli.predict_settings import Settings
from wsiseg.cli.say import say
from wsiseg.inference.cohort import Task
from wsiseg.models.segmenter import ModelInfo
from wsiseg.slides.slide import COARSE, Slide


def warn_of_options(tasks: Iterable[Task], settings: Settings) -> None:
    """Say which options are taken although tables say otherwise."""
    for name, given in (("mpp", settings.mpp), ("tissue", settings.tissue)):
        stated = {t.path: getattr(t, name) for t in tasks}
        other = [path for path, value in stated.items() if value not in (None, given)]
        if given is not None and other:
            say(
                f"wsiseg: warning: --{name} {given} is taken for all slides; a table says otherwise"
                f" of {len(other)} of them, such as {other[0]} ({stated[other[0]]})",
                err=True,
            )


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
