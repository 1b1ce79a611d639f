"""The tables of the HTML report, as HTML. Knows no files; every text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from wsiseg.classes import Classes
from wsiseg.training.curves import row_shares
from wsiseg.training.published import CAVEAT, Row

Rows = Mapping[str, Mapping[str, float | None]]

LABELS = {
    "accuracy": "Accuracy",
    "dice": "Dice",
    "f1": "F1",
    "miou": "Mean IoU",
    "object_f1": "Object F1",
    "object_dice": "Object Dice",
    "object_hausdorff": "Object Hausdorff (px)",
    "uncertainty": "Uncertainty",
}
PIXEL_MEANING = {
    "accuracy": "Share of the labelled pixels that have the right class.",
    "dice": "Twice the overlap over the sum of both areas, for each class, then the mean of the "
    "classes that occur.",
    "f1": "The same as Dice when measured on pixels; given because papers print both.",
    "miou": "Overlap over union, for each class, then the mean of the classes that occur.",
}
OBJECT_MEANING = {
    "f1": "A true object is found when the prediction matched with it covers more than half of "
    "it; F1 weighs missed against superfluous objects.",
    "dice": "Dice of matched objects weighted by their areas, from truth to prediction and back; "
    "an object without a match counts 0.",
    "hausdorff": "Largest distance between matched objects, weighted by their "
    "areas, in pixels; smaller is better.",
}
POOLED = (
    "All labelled pixels of all images are counted in one pooled confusion matrix; pixels to be "
    "ignored are left out. Beside it stand the means of the images' own values, in which a small "
    "image counts as much as a large one; a class that is neither in an image nor in its "
    "prediction is left out of its value, one that is only predicted counts 0."
)


def number(value: float | None, digits: int = 4) -> str:
    """A value as text; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def digits_of(name: str) -> int:
    """Decimals of a measure: distances have two, shares four."""
    return 2 if "hausdorff" in name else 4


def _printed(value: float | None, name: str) -> str:
    """A published value with no more decimals than it is known to."""
    rounded = value is not None and round(value, 3) == value
    return number(value, 3 if rounded and digits_of(name) > 3 else digits_of(name))


def worst_first(rows: Rows) -> list[str]:
    """Names by rising Dice, those without one first, then by name."""

    def key(name: str) -> tuple[float, str]:
        dice = rows[name].get("dice")
        return (-1.0 if dice is None or not math.isfinite(dice) else dice), name

    return sorted(rows, key=key)


def table(head: Sequence[str], body: Sequence[str]) -> str:
    """A table; rows of the body are HTML, headings are text."""
    columns = "".join(
        f'<th scope="col" class="{"text" if name == "Meaning" else ""}">{escape(name)}</th>'
        for name in head
    )
    rows = "\n".join(body)
    return (
        f'<div class="wide"><table><thead><tr>{columns}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


def row_of(name: str, cells: Sequence[str], *, note: str = "", kind: str = "") -> str:
    """A row of texts, with a last cell of prose where there is any."""
    numbers = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    prose = f'<td class="text">{escape(note)}</td>' if note else ""
    return f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{numbers}{prose}</tr>'


def own_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Our pooled values by the names of published rows."""
    pixel, objects = report["pixel"], report.get("object") or {}
    values = {n: pixel[n] for n in PIXEL_MEANING if n in pixel}
    return values | {f"object_{n}": objects[n] for n in OBJECT_MEANING if n in objects}


def own_mean(report: Mapping[str, Any], classes: Sequence[str]) -> dict[str, float]:
    """Our mean IoU and Dice over some classes, where the data has them all."""
    rows = report["pixel"]["per_class"]
    if not all(c in rows for c in classes):
        return {}
    means = {n: sum(rows[c][n] for c in classes) / len(classes) for n in ("iou", "dice")}
    return {"miou": means["iou"], "dice": means["dice"], "f1": means["dice"]}


def tiles(report: Mapping[str, Any]) -> str:
    """The main values in large type."""
    values = {k: v for k, v in own_metrics(report).items() if k != "f1"}
    cells = "".join(
        f'<div class="tile"><strong>{number(v, digits_of(k) if v > 1 else 3)}</strong>'
        f"<span>{escape(LABELS[k])}</span></div>"
        for k, v in values.items()
    )
    return f'<div class="tiles">{cells}</div>\n<p class="soft">{escape(POOLED)}</p>'


def overall(report: Mapping[str, Any]) -> str:
    """Pooled metrics, per-image means beside them, and what they mean."""
    pixel = report["pixel"]
    means = {"f1": report["per_image"].get("dice"), **report["per_image"]}
    body = [
        row_of(LABELS[name], (number(pixel[name]), number(means.get(name))), note=meaning)
        for name, meaning in PIXEL_MEANING.items()
        if name in pixel
    ]
    head = ("Measure", "Pooled", "Mean of images", "Meaning")
    return f"<section><h2>Pixels</h2>{table(head, body)}</section>"


def per_class(report: Mapping[str, Any], classes: Classes) -> str:
    """Dice, IoU, precision and recall of each class, and how much of it there is."""
    matrix = np.asarray(report["pixel"]["confusion"], np.float64)
    shares = matrix.sum(axis=1) / max(1.0, matrix.sum())
    body = []
    for item, share in zip(classes, shares, strict=True):
        values = report["pixel"]["per_class"].get(item.name, {})
        cells = [number(values.get(n)) for n in ("dice", "iou", "precision", "recall")]
        colour = "rgb({},{},{})".format(*item.colour)
        swatch = f'<span class="swatch" style="background:{colour}"></span>'
        numbers = "".join(f"<td>{c}</td>" for c in (*cells, f"{share:.1%}"))
        body.append(f'<tr><th scope="row">{swatch}{escape(item.name)}</th>{numbers}</tr>')
    head = ("Class", "Dice", "IoU", "Precision", "Recall", "Share of labelled pixels")
    words = (
        "Precision: of the pixels called this class, the share that are. Recall: of the pixels "
        "that are this class, the share that were called so. From the pooled matrix; a dash: the "
        "class occurs neither in truth nor in prediction."
    )
    return (
        f'<section><h2>Classes</h2>{table(head, body)}<p class="soft">{escape(words)}</p></section>'
    )


def objects(report: Mapping[str, Any]) -> str:
    """Object metrics, or nothing where the data set has no objects."""
    values = report.get("object")
    if not values:
        return ""
    means = values.get("per_image", {})
    body = [
        row_of(
            LABELS[f"object_{name}"],
            [number(v.get(name), digits_of(name)) for v in (values, means)],
            note=meaning,
        )
        for name, meaning in OBJECT_MEANING.items()
        if name in values
    ]
    head = ("Measure", "All images", "Mean of images", "Meaning")
    return f"<section><h2>Objects</h2>{table(head, body)}</section>"


def beside_published(report: Mapping[str, Any], published: Sequence[Row]) -> str:
    """Ours and the published rows in one table, with what makes them hard to compare."""
    if not published:
        return ""
    names = [n for n in LABELS if any(n in row.metrics for row in published)]
    split = str(report["split"])
    body = []
    for classes in dict.fromkeys(row.classes for row in published):
        ours = own_metrics(report) if not classes else own_mean(report, classes)
        cells = [split, *(number(ours.get(n), digits_of(n)) for n in names)]
        title = f"This model, mean of {', '.join(classes)}" if classes else "This model"
        body.append(row_of(title, cells, kind="ours"))
    for row in published:
        ious = ", ".join(f"{k} {number(v)}" for k, v in row.per_class.items())
        note = ". ".join(t for t in (row.source, row.note, ious and f"IoU: {ious}") if t)
        cells = [row.split, *(_printed(row.metrics.get(n), n) for n in names)]
        body.append(row_of(row.method, cells, kind="noted"))
        body.append(f'<tr><td class="text" colspan="{len(cells) + 1}">{escape(note)}.</td></tr>')
    head = ("Method", "Part", *(LABELS[n] for n in names))
    caveat = f'<p class="note">{escape(CAVEAT)}</p>'
    return f"<section><h2>Beside published values</h2>{caveat}{table(head, body)}</section>"


def largest_confusions(matrix: Sequence[Sequence[int]], classes: Classes) -> list[str]:
    """The up to three largest shares, from 1% on, of a true class called another, in words."""
    shares = row_shares(np.asarray(matrix))
    found = [
        (float(share), t, p)
        for (t, p), share in np.ndenumerate(shares)
        if t != p and share >= 0.01  # False for NaN
    ]
    return [
        f"{share:.1%} of the pixels of {classes.names[t]} were called {classes.names[p]}."
        for share, t, p in sorted(found, reverse=True)[:3]
    ]


def per_image(rows: Rows, anchors: Mapping[str, str]) -> str:
    """A histogram of Dice and the sortable table of all images, worst first."""
    if not rows:
        return ""
    names = list(dict.fromkeys(n for row in rows.values() for n in row))
    heads = "".join(
        f'<th scope="col"{" aria-sort=ascending" if label == LABELS["dice"] else ""}>'
        f'<button type="button">{escape(label)}</button></th>'
        for label in ("Image", *(LABELS.get(n, n) for n in names))
    )
    body = "\n".join(_image_row(n, rows[n], names, anchors.get(n)) for n in worst_first(rows))
    return (
        f"<section><h2>Images</h2>{_histogram(rows)}\n"
        '<p class="soft">Worst first; press a heading to sort by it. '
        "Names that are links have a picture below.</p>"
        f'<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _image_row(
    name: str, row: Mapping[str, float | None], names: Sequence[str], anchor: str | None
) -> str:
    text = escape(name)
    label = f'<a href="#{escape(anchor)}">{text}</a>' if anchor else text
    cells = [f'<th scope="row" data-v="{text}">{label}</th>']
    for n in names:
        value = row.get(n)
        known = value is not None and math.isfinite(value)
        bar = f' class="bar" style="--v:{value:.3f}"' if n == "dice" and known else ""
        raw = f"{value:.6f}" if known else ""
        cells.append(f'<td data-v="{raw}"{bar}>{number(value, digits_of(n))}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _histogram(rows: Rows) -> str:
    """Numbers of images by Dice in steps of 0.05, as a drawing with its median in words."""
    known = [v for v in (row.get("dice") for row in rows.values()) if v is not None]
    values = np.array([v for v in known if math.isfinite(v)])
    if not len(values):
        return ""
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    bars = []
    for i, count in enumerate(counts):
        height = 110 * count / counts.max()
        if count:
            tip = f"{count} with Dice {i / 20:.2f} to {(i + 1) / 20:.2f}"
            place = f'x="{10 + i * 30}" y="{130 - height:.1f}" width="27" height="{height:.1f}"'
            bars.append(f"<rect {place}><title>{tip}</title></rect>")
            place = f'x="{23.5 + i * 30}" y="{125 - height:.1f}"'
            bars.append(f'<text {place} text-anchor="middle">{count}</text>')
    axis = "".join(
        f'<text x="{8.5 + i * 60}" y="147" text-anchor="middle">{i / 10:g}</text>'
        for i in range(11)
    )
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    words = (
        f"Dice of single images: median {middle:.3f}, half of them from {low:.3f} to {high:.3f}, "
        f"lowest {values.min():.3f}, highest {values.max():.3f}."
    )
    return (
        f'<p>{words}</p><svg viewBox="0 0 620 152" width="620" role="img" '
        f'aria-label="Numbers of images by Dice" style="max-width:100%">'
        f'<line x1="8" y1="130.5" x2="612" y2="130.5"/>{"".join(bars)}{axis}</svg>'
    )
