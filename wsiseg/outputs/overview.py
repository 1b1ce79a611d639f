"""A picture of slide and result side by side, with legend and scale bar. Knows no polygons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

from wsiseg.atomic import staged
from wsiseg.canvas import Canvas
from wsiseg.geometry import Box, Size
from wsiseg.lettering import font, shortened
from wsiseg.outputs.sidecar import ClassArea, class_areas

UInt8 = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.integer[Any]]

PANEL = Size(800, 1000)
"""Largest panel where the two stand side by side."""
WIDE_PANEL = Size(1600, 700)
"""Largest panel where the two stand one over the other, for wide slides."""
SMALLEST_PX = 480
"""Long side to which the panels of small images are enlarged."""

MARGIN = 24
GAP = 16
HEADER = 76
ROW = 30
INK, GREY, RULE, PAPER = (28, 32, 38), (104, 112, 122), (206, 210, 216), (255, 255, 255)
FILL, FILL_BACKGROUND = 0.40, 0.14


def write_overview(
    path: str | Path, canvas: Canvas, *, areas: Sequence[ClassArea] | None = None
) -> None:
    """Write `<slide>.overview.png`: the slide, the slide with its classes, legend, scale bar.

    Classes are laid over the thumbnail in their colours with their borders and those of objects
    drawn; background classes only faintly. Memory bound: one row of chunks and the picture itself.

    Args:
        path: the file; it appears when it is complete.
        canvas: labels, thumbnail (white where there is none) and record.
        areas: what `class_areas` gave; counted when left out.

    Raises:
        OutputError: the file cannot be written.
    """
    picture = draw_overview(canvas, class_areas(canvas) if areas is None else areas)
    with staged(Path(path)) as (temporary,):
        picture.save(temporary, format="PNG", optimize=True)


def draw_overview(canvas: Canvas, areas: Sequence[ClassArea]) -> Image.Image:
    """The overview as an RGB picture; see `write_overview`."""
    wide = canvas.grid.size.width > 1.6 * canvas.grid.size.height
    panel = _panel_size(canvas.grid.size, WIDE_PANEL if wide else PANEL)
    slide = _thumbnail(canvas, panel)
    overlay = _overlay(canvas, slide)
    second = (0, panel.height + GAP) if wide else (panel.width + GAP, 0)
    content = Size(max(panel.width + second[0], 2 * SMALLEST_PX + GAP), panel.height + second[1])
    legend_top = HEADER + content.height + GAP
    size = (
        content.width + 2 * MARGIN,
        legend_top + _legend_rows(areas, content.width) * ROW + MARGIN,
    )
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    _header(draw, canvas, content.width)
    left = MARGIN + (content.width - panel.width - second[0]) // 2
    for image, (dx, dy) in ((slide, (0, 0)), (overlay, second)):
        x, y = left + dx, HEADER + dy
        picture.paste(Image.fromarray(image), (x, y))
        draw.rectangle((x - 1, y - 1, x + panel.width, y + panel.height), outline=RULE)
    frame = Box(left + second[0], HEADER + second[1], *panel)
    _scale_bar(picture, frame, canvas.grid.size.width * canvas.grid.mpp_x / panel.width)
    if canvas.record.get("status") == "no tissue":
        _banner(draw, frame, "No tissue found")
    _legend(draw, canvas, areas, Box(MARGIN, legend_top, content.width, 0))
    return picture


def _panel_size(size: Size, largest: Size) -> Size:
    scale = min(largest.width / size.width, largest.height / size.height)
    scale = min(scale, max(1.0, SMALLEST_PX / max(size)))
    return Size(max(1, round(size.width * scale)), max(1, round(size.height * scale)))


def _thumbnail(canvas: Canvas, panel: Size) -> UInt8:
    """(h, w, 3) uint8 slide at the size of a panel."""
    image = canvas.image("thumbnail")
    if image is None:
        return np.full((panel.height, panel.width, 3), 255, np.uint8)
    resized = Image.fromarray(image).resize(panel, Image.Resampling.LANCZOS)
    return np.asarray(resized.convert("RGB"))


def _sampled(canvas: Canvas, panel: Size, read: Callable[[Box], Labels]) -> Labels:
    """(h, w) values under the centres of the panel's pixels, a row of chunks at a time."""
    width, height = canvas.grid.size
    xs = ((np.arange(panel.width) + 0.5) * width / panel.width).astype(np.int64)
    ys = ((np.arange(panel.height) + 0.5) * height / panel.height).astype(np.int64)
    rows = []
    for top in range(0, height, canvas.chunk_px):
        inside = ys[(ys >= top) & (ys < top + canvas.chunk_px)]
        if len(inside):
            band = read(Box(0, top, width, min(canvas.chunk_px, height - top)))
            rows.append(band[inside - top][:, xs])
    return np.concatenate(rows)


def _overlay(canvas: Canvas, slide: UInt8) -> UInt8:
    """The slide with class colours laid over it and the borders of classes and objects drawn."""
    panel = Size(slide.shape[1], slide.shape[0])
    labels = _sampled(canvas, panel, canvas.labels)
    colours = _sampled(canvas, panel, canvas.colours) if canvas.has_objects else labels
    alpha = np.zeros(256, np.float32)
    lined = np.zeros(256, bool)
    for value, item in canvas.classes.values():
        alpha[value] = FILL_BACKGROUND if item.background else FILL
        lined[value] = not item.background
    border = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        differ = np.diff(colours.astype(np.int32), axis=axis) != 0
        border |= np.pad(differ, [(0, 1) if a == axis else (0, 0) for a in (0, 1)])
        border |= np.pad(differ, [(1, 0) if a == axis else (0, 0) for a in (0, 1)])
    border = ndimage.binary_dilation(border)
    weight = np.where(border & lined[labels], np.float32(1), alpha[labels])[..., None]
    painted = canvas.classes.lookup()[labels]
    mixed: UInt8 = np.round(slide * (1 - weight) + painted * weight).astype(np.uint8)
    return mixed


def _header(draw: ImageDraw.ImageDraw, canvas: Canvas, width: int) -> None:
    record = canvas.record
    name = str(record.get("slide", {}).get("path", canvas.path.stem))
    draw.text((MARGIN, 16), shortened(draw, name, 24, width), fill=INK, font=font(24))
    grid = canvas.grid
    width_mm, height_mm = (
        n * m / 1000 for n, m in zip(grid.size, (grid.mpp_x, grid.mpp_y), strict=True)
    )
    extent = f"{width_mm:.2f} x {height_mm:.2f} mm"
    model = str(record.get("model", {}).get("name", "unknown"))
    line = f"model {model}   |   {grid.mpp:g} um per pixel   |   {extent}"
    draw.text((MARGIN, 47), shortened(draw, line, 15, width), fill=GREY, font=font(15))


def round_length_um(largest_um: float) -> float:
    """The largest of 1, 2, 5, 10, 20, ... micrometres (or 0.5, 0.2, ...) not over `largest_um`."""
    power = 10.0 ** math.floor(math.log10(largest_um))
    return max(step * power for step in (1, 2, 5) if step * power <= largest_um * (1 + 1e-9))


def length_text(um: float) -> str:
    """A length as text, in mm from 1 mm on."""
    return f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} um"


def area_text(mm2: float) -> str:
    """An area as text up to its unit's exponent, which the font of the pictures lacks."""
    return f"{mm2:.2g} mm" if 0 < mm2 < 0.01 else f"{mm2:.3f} mm" if mm2 < 100 else f"{mm2:.0f} mm"


def _scale_bar(picture: Image.Image, frame: Box, um_per_px: float) -> None:
    """A bar of a round length of at most a quarter of the frame, at its bottom left."""
    um = round_length_um(max(frame.width, 8) * um_per_px / 4)
    bar, text = max(1, round(um / um_per_px)), length_text(um)
    draw = ImageDraw.Draw(picture, "RGBA")
    width = max(bar, int(draw.textlength(text, font=font(16)))) + 20
    x, y = frame.x + 10, frame.bottom - 54
    draw.rounded_rectangle((x, y, x + width, y + 44), 6, fill=(255, 255, 255, 215))
    middle = x + width / 2
    draw.text((middle, y + 15), text, fill=INK, font=font(16), anchor="mm")
    draw.rectangle((middle - bar / 2, y + 30, middle + bar / 2, y + 34), fill=INK)


def _banner(draw: ImageDraw.ImageDraw, frame: Box, text: str) -> None:
    x, y = frame.x + frame.width / 2, frame.y + frame.height / 2
    half = draw.textlength(text, font=font(28)) / 2 + 20
    box = (x - half, y - 28, x + half, y + 28)
    draw.rounded_rectangle(box, 8, fill=PAPER, outline=INK, width=2)
    draw.text((x, y), text, fill=INK, font=font(28), anchor="mm")


def _legend_columns(areas: Sequence[ClassArea], width: int) -> int:
    return max(1, min(len(areas), width // 470))


def _legend_rows(areas: Sequence[ClassArea], width: int) -> int:
    return -(-len(areas) // _legend_columns(areas, width))


def _legend(
    draw: ImageDraw.ImageDraw, canvas: Canvas, areas: Sequence[ClassArea], box: Box
) -> None:
    """Colour, name, area and share of each class, in columns."""
    columns = _legend_columns(areas, box.width)
    rows = _legend_rows(areas, box.width)
    for i, (item, area) in enumerate(zip(canvas.classes, areas, strict=True)):
        x = box.x + (i // rows) * (box.width // columns)
        y = box.y + (i % rows) * ROW + ROW // 2
        draw.rounded_rectangle((x, y - 9, x + 26, y + 9), 4, fill=item.colour, outline=GREY)
        name = shortened(draw, item.name, 17, 216)
        draw.text((x + 36, y), name, fill=INK, font=font(17), anchor="lm")
        draw.text((x + 352, y), area_text(area.mm2), fill=INK, font=font(17), anchor="rm")
        draw.text((x + 353, y - 5), "2", fill=INK, font=font(11), anchor="lm")
        draw.text((x + 435, y), f"{area.percent:.1f} %", fill=GREY, font=font(17), anchor="rm")
