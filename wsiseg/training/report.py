"""The HTML report of an evaluation: one file that needs no other. Measures nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypedDict

from PIL import Image

from wsiseg import __version__
from wsiseg.atomic import staged
from wsiseg.classes import Classes
from wsiseg.errors import OutputError
from wsiseg.training import report_tables as tables
from wsiseg.training.panels import panel_file
from wsiseg.training.published import Row
from wsiseg.training.report_calibration import calibration_section
from wsiseg.training.report_style import SCRIPT, STYLE
from wsiseg.training.report_tables import Rows, number

PANEL_PX = 1600
"""Widest panel in the report; panels are kept as JPEG there, the other pictures as PNG."""

THIRDS = ("Lowest third by Dice", "Middle third by Dice", "Highest third by Dice")

PLOT_SCALE = 0.72
"""Size at which plots are shown, so that their letters match the page's."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Pictures(TypedDict, total=False):
    """Files to put into a report.

    Attributes:
        confusion: what `draw_confusion` wrote.
        reliability: what `draw_reliability` wrote.
        panels: what `write_panel` wrote, named by `panel_file`, such as those of the worst, the
            median and the best images; all are embedded.
    """

    confusion: Path
    reliability: Path
    panels: Sequence[Path]


def write_report(
    path: str | Path,
    report: Mapping[str, Any],
    *,
    classes: Classes,
    rows: Rows,
    images: Pictures,
    published: Sequence[Row] = (),
) -> None:
    """Write the report of an evaluation as one HTML file without links to anything outside it.

    Args:
        path: the file; it appears when it is complete.
        report: what stands in `metrics.json`.
        classes: the classes, in the order of the confusion matrix.
        rows: metrics of each image, by name.
        images: pictures to embed.
        published: rows to stand beside ours.

    Raises:
        OutputError: a picture cannot be read or the file cannot be written.
    """
    shown = _shown_panels(rows, images.get("panels", ()))
    anchors = {name: f"panel-{i}" for i, name in enumerate(shown)}
    sections = [
        _header(report),
        tables.overall(report),
        tables.per_class(report, classes),
        tables.objects(report),
        tables.beside_published(report, published),
        _confusion(report, classes, images.get("confusion")),
        _calibration(report, images.get("reliability")),
        tables.per_image(rows, anchors),
        _panels(rows, shown, anchors),
    ]
    title = escape(f"{report['model']} on {report['dataset']['name']} {report['split']}")
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>Written by wsiseg {escape(__version__)}. The values describe these images; "
        "tissue that is stained, scanned or prepared in another way may fare worse. Not for "
        f"diagnosis.</footer>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
    with staged(Path(path)) as (temporary,):
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def _header(report: Mapping[str, Any]) -> str:
    """What was measured on what, and how to do it again."""
    dataset = report["dataset"]
    options = [f"{k} = {v}" for k, v in dataset.items() if k != "name"]
    seeds = report.get("seeds", 0)
    facts = {
        "Model": report["model"],
        "Weights (SHA-256)": report.get("sha256"),
        "Data set": "; ".join([str(dataset["name"]), *options]),
        "Part": report["split"],
        "Fold": report.get("fold"),
        "Images": report["images"],
        "Flips and turns averaged": "yes" if report.get("tta") else "no",
        "Noise seeds": ", ".join(map(str, seeds)) if isinstance(seeds, list | tuple) else seeds,
        "Smallest object counted (um\u00b2)": report.get("min_object_um2") or None,
        "Holes of objects filled": "yes" if report.get("fill_holes") else None,
        "Post-processing of the model": "left out" if report.get("raw") else None,
        "Licence of the weights": report.get("licence"),
    }
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in facts.items()
        if value not in (None, "")
    )
    if report.get("command"):
        items += f"<dt>Command</dt><dd><code>{escape(str(report['command']))}</code></dd>"
    heading = escape(f"{report['model']} on {dataset['name']}, {report['split']}")
    return f"<header><h1>{heading}</h1>\n<dl>{items}</dl></header>\n{tables.tiles(report)}"


def _confusion(report: Mapping[str, Any], classes: Classes, picture: Path | None) -> str:
    """The picture of the confusion matrix and its largest confusions in words."""
    lines = tables.largest_confusions(report["pixel"]["confusion"], classes)
    words = "".join(f"<li>{escape(line)}</li>" for line in lines)
    image = "" if picture is None else _figure(picture, "Confusion matrix", lossy=False)
    if not (words or image):
        return ""
    heading = "<h2>What was taken for what</h2>"
    return f"<section>{heading}{f'<ul>{words}</ul>' if words else ''}{image}</section>"


def _calibration(report: Mapping[str, Any], picture: Path | None) -> str:
    """How far the probabilities can be trusted, or nothing where that was not measured."""
    image = "" if picture is None else _figure(picture, "Reliability diagram", lossy=False)
    return calibration_section(report, image)


def _shown_panels(rows: Rows, panels: Sequence[Path]) -> dict[str, tuple[str, Path]]:
    """(third of the images by Dice, file) by name of the images with a panel, worst first."""
    files = {path.name: path for path in panels}
    return {
        name: (THIRDS[3 * rank // len(rows)], files[panel_file(name)])
        for rank, name in enumerate(tables.worst_first(rows))
        if panel_file(name) in files
    }


def _panels(rows: Rows, shown: Mapping[str, tuple[str, Path]], anchors: Mapping[str, str]) -> str:
    """The panels under the third of the images that each belongs to."""
    parts: list[str] = []
    last = ""
    for name, (kind, path) in shown.items():
        if kind != last:
            parts.append(f"<h3>{kind}</h3>")
            last = kind
        caption = f"{name}: Dice {number(rows[name].get('dice'))}"
        parts.append(_figure(path, caption, lossy=True, anchor=anchors[name]))
    if not parts:
        return ""
    legend = (
        '<p class="soft">Truth and prediction lie over the tissue as faint colour with full '
        "borders. Missed: labelled as a class but called background; falsely marked: the reverse. "
        "Hatched tissue is not labelled and not counted.</p>"
    )
    return f"<section><h2>Images to look at</h2>{legend}{''.join(parts)}</section>"


def _figure(path: Path, caption: str, *, lossy: bool, anchor: str = "") -> str:
    text = escape(caption)
    place = f' id="{escape(anchor)}"' if anchor else ""
    source, (width, height) = _embedded(path, lossy=lossy)
    scale = 1.0 if lossy else PLOT_SCALE
    size = f'width="{round(width * scale)}" height="{round(height * scale)}"'
    label = f"<figcaption>{text}</figcaption>" if lossy else ""
    return f'<figure{place}>{label}<img src="{source}" alt="{text}" {size}></figure>\n'


def _embedded(path: Path, *, lossy: bool) -> tuple[str, tuple[int, int]]:
    """(data URI, (width, height)) of a picture file.

    Raises:
        OutputError: it cannot be read.
    """
    try:
        with Image.open(path) as source:
            image = source.convert("RGB")
    except OSError as e:
        raise OutputError(f"{path}: cannot be read as a picture ({e})") from e
    data = io.BytesIO()
    if lossy:
        image.thumbnail((PANEL_PX, 10 * PANEL_PX), Image.Resampling.LANCZOS)
        image.save(data, format="JPEG", quality=82)
    else:
        image.save(data, format="PNG", optimize=True)
    kind = "jpeg" if lossy else "png"
    text = base64.b64encode(data.getvalue()).decode("ascii")
    return f"data:image/{kind};base64,{text}", image.size
