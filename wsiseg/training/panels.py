"""A picture of an image with its labels, a prediction and where they differ. Knows no networks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

from wsiseg.atomic import staged
from wsiseg.classes import IGNORE, Classes, Colour
from wsiseg.errors import UsageError
from wsiseg.geometry import Size
from wsiseg.lettering import font, shortened
from wsiseg.names import usable_stem

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

WIDTH_PX = 1600
"""Width of the picture, about."""
NARROW_PX = 900
"""Width below which the keys of classes and errors have no room side by side."""
SMALLEST_PX = 440
"""Long side to which small images are enlarged."""
LARGEST_HEIGHT_PX = 1000
"""Height of the largest panel."""

MARGIN, GAP, HEADER, CAPTION, ROW = 24, 16, 76, 28, 30
INK, GREY, RULE, PAPER = (28, 32, 38), (104, 112, 122), (206, 210, 216), (255, 255, 255)
FILL = 0.22
MISSED, EXTRA, CONFUSED = (213, 94, 0), (0, 114, 178), (230, 180, 0)
"""Colours of the kinds of error, told apart by colour-blind readers too."""
HEAT = ((20, 12, 60), (100, 26, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""Colours of uncertainty from none to the largest."""


class Key(NamedTuple):
    """A line of the legend."""

    colour: Colour
    text: str
    number: str


def panel_file(name: str) -> str:
    """The file name of an image's panel: different for different names, whatever they hold.

    Letters of all scripts stay as they are; names that no file could have are cut, with a checksum.
    """
    stem = "".join(
        c if c.isalnum() else quote(c, safe=" (),+=@", errors="surrogateescape") for c in name
    )
    return f"{usable_stem(stem)}.png"


def write_panel(
    path: str | Path,
    image: UInt8,
    truth: UInt8,
    predicted: UInt8,
    classes: Classes,
    *,
    uncertainty: Float32 | None = None,
) -> None:
    """Write one PNG: image, truth, prediction and errors, and uncertainty where it is given.

    Truth and prediction lie over the tissue as faint colour with full borders; ignored pixels
    are hatched. Large images are made smaller so that the picture is about 1600 px wide.

    Args:
        path: the file, whose name by `panel_file` is the heading; it appears when complete.
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) uint8 classes 0..C-1, 255 = ignore.
        predicted: (H, W) uint8 classes 0..C-1.
        classes: the classes.
        uncertainty: (H, W) floats, larger = less sure.

    Raises:
        UsageError: arrays that differ in size.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    title = unquote(path.stem)
    picture = draw_panel(image, truth, predicted, classes, uncertainty=uncertainty, title=title)
    with staged(path) as (temporary,):
        picture.save(temporary, format="PNG", compress_level=6)


def draw_panel(
    image: UInt8,
    truth: UInt8,
    predicted: UInt8,
    classes: Classes,
    *,
    uncertainty: Float32 | None = None,
    title: str = "",
) -> Image.Image:
    """The picture of `write_panel`, as RGB."""
    shapes = [image.shape[:2], truth.shape, predicted.shape]
    shapes += [] if uncertainty is None else [uncertainty.shape]
    if len(set(shapes)) != 1:
        raise UsageError(f"{title or 'panel'}: image and labels differ in size: {shapes}")
    size, columns = _layout(Size(image.shape[1], image.shape[0]), 4 + (uncertainty is not None))
    small = _resized(image, size)
    small_truth, small_predicted = _sampled(truth, size), _sampled(predicted, size)
    parts = [
        ("Image", small),
        ("Truth", overlay(small, small_truth, classes)),
        ("Prediction", overlay(small, small_predicted, classes)),
        (
            "Differences, with the borders of the truth",
            _errors(small, small_truth, small_predicted, classes),
        ),
    ]
    if uncertainty is not None:
        parts.append((f"Uncertainty, 0 to {uncertainty.max():.2g}", _heat(small, uncertainty)))
    correct = np.mean((truth == predicted)[truth != IGNORE]) if (truth != IGNORE).any() else 0.0
    line = (
        f"{image.shape[1]} x {image.shape[0]} px   |   {correct:.1%} of the labelled pixels agree"
    )
    keys = [_class_keys(truth, predicted, classes), _error_keys(truth, predicted, classes)]
    return _composed(parts, columns, (title or "Image", line), keys)


def _composed(
    parts: list[tuple[str, UInt8]], columns: int, heading: tuple[str, str], keys: list[list[Key]]
) -> Image.Image:
    """Panels in a grid with heading and legend."""
    height, width = parts[0][1].shape[:2]
    rows = -(-len(parts) // columns)
    inner = max(columns * (width + GAP) - GAP, 640)
    top = HEADER + rows * (height + CAPTION + GAP)
    legend = _legend(keys, inner)
    picture = Image.new("RGB", (inner + 2 * MARGIN, top + legend.height + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    for text, y, px, ink in ((heading[0], 16, 24, INK), (heading[1], 47, 15, GREY)):
        draw.text((MARGIN, y), shortened(draw, text, px, inner), fill=ink, font=font(px))
    for i, (caption, pixels) in enumerate(parts):
        x = MARGIN + (i % columns) * (width + GAP)
        y = HEADER + (i // columns) * (height + CAPTION + GAP)
        draw.text((x, y + 6), shortened(draw, caption, 16, width), fill=INK, font=font(16))
        picture.paste(Image.fromarray(pixels), (x, y + CAPTION))
        draw.rectangle((x - 1, y + CAPTION - 1, x + width, y + CAPTION + height), outline=RULE)
    picture.paste(legend, (MARGIN, top))
    return picture


def _layout(size: Size, count: int) -> tuple[Size, int]:
    """(size of each panel, columns): one row for narrow images, else two rows."""
    columns = count if size.height > 1.7 * size.width else -(-count // 2)
    widest = (WIDTH_PX - 2 * MARGIN - (columns - 1) * GAP) // columns
    scale = min(widest / size.width, LARGEST_HEIGHT_PX / size.height)
    scale = min(scale, max(1.0, SMALLEST_PX / max(size)))
    return Size(*(max(1, round(n * scale)) for n in size)), columns


def _resized(image: UInt8, size: Size) -> UInt8:
    resized = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(resized.convert("RGB"))


def _sampled(labels: UInt8, size: Size) -> UInt8:
    """Labels under the centres of a panel's pixels."""
    xs = ((np.arange(size.width) + 0.5) * labels.shape[1] / size.width).astype(np.int64)
    ys = ((np.arange(size.height) + 0.5) * labels.shape[0] / size.height).astype(np.int64)
    sampled: UInt8 = labels[ys][:, xs]
    return sampled


def borders(labels: UInt8, width: int = 3) -> npt.NDArray[np.bool_]:
    """(H, W) whether a pixel has one of another class within `width` px; ignored ones have not."""
    window = 2 * width + 1
    labelled = np.where(labels == IGNORE, np.uint8(0), labels)
    smallest = ndimage.minimum_filter(labels, window, mode="nearest")  # IGNORE is the largest
    largest = ndimage.maximum_filter(labelled, window, mode="nearest")
    border: npt.NDArray[np.bool_] = (smallest < largest) & (labels != IGNORE)
    return border


def overlay(image: UInt8, labels: UInt8, classes: Classes) -> UInt8:
    """(H, W, 3) uint8: classes as faint colour with full borders; ignored pixels hatched.

    Tissue of a background class stays as it is.
    """
    colours = np.zeros((256, 3), np.float32)
    lined = np.zeros(256, bool)
    for k, item in enumerate(classes):
        colours[k], lined[k] = item.colour, not item.background
    border = borders(labels) & lined[labels]
    weight = np.where(border, np.float32(1), np.float32(FILL) * lined[labels])[..., None]
    mixed = image * (1 - weight) + colours[labels] * weight
    return _hatched(np.round(mixed).astype(np.uint8), labels == IGNORE)


def _hatched(image: UInt8, where: npt.NDArray[np.bool_]) -> UInt8:
    """The image paler where asked, with thin diagonal lines there."""
    ys, xs = np.indices(where.shape)
    line = where & ((xs + ys) % 12 < 2)
    pale = np.where(where[..., None], image * 0.45 + 255 * 0.55, image)
    hatched: UInt8 = np.where(line[..., None], 130, pale).astype(np.uint8)
    return hatched


def error_kinds(truth: UInt8, predicted: UInt8, classes: Classes) -> UInt8:
    """(H, W) uint8: 0 right or ignored, 1 missed (called background), 2 extra, 3 confused."""
    background = np.zeros(256, bool)
    background[: len(classes)] = [item.background for item in classes]
    kinds = np.full(truth.shape, 3, np.uint8)
    kinds[background[predicted] & ~background[truth]] = 1
    kinds[background[truth] & ~background[predicted]] = 2
    kinds[(truth == predicted) | (truth == IGNORE)] = 0
    return kinds


def _errors(image: UInt8, truth: UInt8, predicted: UInt8, classes: Classes) -> UInt8:
    """Grey tissue with the wrong pixels in the colours of their kinds."""
    grey = image.astype(np.float32).mean(-1, keepdims=True).repeat(3, -1) * 0.5 + 255 * 0.5
    kinds = error_kinds(truth, predicted, classes)
    colours = np.array([(0, 0, 0), MISSED, EXTRA, CONFUSED], np.float32)[kinds]
    weight = (kinds > 0)[..., None] * np.float32(0.72)
    mixed = grey * (1 - weight) + colours * weight
    mixed[borders(truth, 1)] = (60, 64, 70)
    return _hatched(np.round(mixed).astype(np.uint8), truth == IGNORE)


def _heat(image: UInt8, uncertainty: Float32) -> UInt8:
    """Uncertainty from dark to bright, scaled to its largest value."""
    size = (image.shape[1], image.shape[0])
    values = Image.fromarray(np.ascontiguousarray(uncertainty, np.float32)).resize(size)
    share = np.clip(np.asarray(values) / max(float(uncertainty.max()), 1e-12), 0, 1)
    table = np.array(HEAT, np.float32)
    at = np.linspace(0, 1, len(table))
    heat = np.stack([np.interp(share, at, table[:, c]) for c in range(3)], axis=-1)
    return np.round(heat).astype(np.uint8)


def _class_keys(truth: UInt8, predicted: UInt8, classes: Classes) -> list[Key]:
    """Share of the labelled pixels that each class has in truth and prediction."""
    kept = truth != IGNORE
    total = max(1, int(kept.sum()))
    keys = []
    for k, item in enumerate(classes):
        shares = [np.count_nonzero(kept & (labels == k)) / total for labels in (truth, predicted)]
        if any(shares):
            text = f"truth {shares[0]:.1%}   predicted {shares[1]:.1%}"
            keys.append(Key(item.colour, item.name, text))
    return keys


def _error_keys(truth: UInt8, predicted: UInt8, classes: Classes) -> list[Key]:
    kept = truth != IGNORE
    kinds = error_kinds(truth, predicted, classes)
    lines = ((MISSED, "Missed"), (EXTRA, "Falsely marked"), (CONFUSED, "One class for another"))
    keys = []
    for kind, (colour, text) in enumerate(lines, start=1):
        count = np.count_nonzero(kinds == kind)
        if count:
            keys.append(Key(colour, text, f"{count / kept.sum():.1%}"))
    if not kept.all():
        keys.append(
            Key((200, 200, 200), "Hatched: not labelled", f"{1 - kept.mean():.1%} of the image")
        )
    return keys


def _legend(groups: list[list[Key]], width: int) -> Image.Image:
    """The groups of keys side by side, each in one column; in a narrow picture in one for all."""
    if width < NARROW_PX:
        groups = [[key for keys in groups for key in keys]]
    rows = max(len(keys) for keys in groups)
    legend = Image.new("RGB", (width, max(1, rows) * ROW), PAPER)
    draw = ImageDraw.Draw(legend)
    column = width // len(groups)
    for g, keys in enumerate(groups):
        for i, key in enumerate(keys):
            x, y = g * column, i * ROW + ROW // 2
            draw.rounded_rectangle((x, y - 9, x + 26, y + 9), 4, fill=key.colour, outline=GREY)
            number = draw.textlength(key.number, font=font(15))
            name = shortened(draw, key.text, 17, column - number - 76)
            draw.text((x + 36, y), name, fill=INK, font=font(17), anchor="lm")
            right = min(column - 24, 36 + 240 + math.ceil(number))
            draw.text((x + right, y), key.number, fill=GREY, font=font(15), anchor="rm")
    return legend
