"""Pictures of a run: curves, confusions, reliability, label efficiency. Knows no networks.

matplotlib is imported where a picture is drawn, without its global state and without a display.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsiseg.atomic import staged
from wsiseg.classes import Classes
from wsiseg.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Float = npt.NDArray[np.float64]

INK, GREY, RULE = "#1c2026", "#68707a", "#ced2d8"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#333333")
"""Colours that colour-blind readers can tell apart."""
DPI = 150
NOT_LOSSES = ("step", "epoch", "learning_rate", "seconds", "held_out_images")
MEASURES = {"dice": "Dice", "miou": "mIoU", "accuracy": "Accuracy"}
PRETRAINED = ("knn_accuracy", "effective_rank", "psnr", "conditioned")
"""Of a stage of the pretraining the first of these is shown, else the first error."""


def draw_curves(run: str | Path) -> Path:
    """Write `curves.png` of a run: losses, learning rate and, where there was any, validation.

    Args:
        run: folder with `log.csv` (step, learning_rate, seconds, loss, other losses) and perhaps
            `validation.csv` (step, accuracy, dice, miou).

    Returns:
        The picture.

    Raises:
        UsageError: no log, or one that is not a table of numbers.
        OutputError: the picture cannot be written.
    """
    run = Path(run)
    log = read_columns(run / "log.csv")
    if not log:
        raise UsageError(f"{run / 'log.csv'}: is not there or empty; no curves to draw")
    validation = read_columns(run / "validation.csv")
    figure, axes = _figure(1 + bool(validation), width=8.6, height=3.4)
    _draw_losses(axes[0], log)
    if validation:
        _draw_validation(axes[1], validation)
        axes[1].sharex(axes[0])
    axes[-1].set_xlabel("optimiser step")
    figure.suptitle(run.resolve().name, x=0.02, ha="left", fontsize=12, color=INK, parse_math=False)
    path = run / "curves.png"
    _save(figure, path)
    return path


def read_columns(path: Path) -> dict[str, Float]:
    """Columns of a CSV file of numbers by name; empty where the file or its rows are missing.

    Raises:
        UsageError: a cell that is no number, or rows of different lengths.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            names, *rows = list(csv.reader(file)) or [[]]
        table = np.array([[float(cell) for cell in row] for row in rows if row], np.float64)
    except (OSError, ValueError, csv.Error) as e:
        raise UsageError(f"{path}: not a table of numbers ({e})") from e
    if "step" not in names or not len(table):
        return {}
    if table.ndim != 2 or table.shape[1] != len(names):
        raise UsageError(f"{path}: not a table of numbers (rows do not fit the header)")
    return {name: table[:, i] for i, name in enumerate(names)}


def smoothed(values: Float, width: int) -> Float:
    """(N,) centred running means over `width` values, fewer at the ends; NaN is left out."""
    kept = np.isfinite(values)
    kernel = np.ones(min(width, len(values)))
    total = np.convolve(np.where(kept, values, 0), kernel, mode="same")
    count = np.convolve(kept.astype(np.float64), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _draw_losses(axes: Axes, log: Mapping[str, Float]) -> None:
    steps = log["step"]
    names = [n for n in log if n not in NOT_LOSSES]
    width = max(1, len(steps) // 25)
    for i, name in enumerate(sorted(names, key=lambda n: n != "loss")):
        colour = SERIES[i % len(SERIES)]
        axes.plot(steps, log[name], color=colour, alpha=0.25, linewidth=0.8)
        label = name.replace("_", " ")
        dot = "o" if len(steps) == 1 else None
        axes.plot(steps, smoothed(log[name], width), color=colour, label=label, marker=dot)
    axes.set_ylabel("training loss")
    values = np.concatenate([smoothed(log[n], width) for n in names] or [np.zeros(1)])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.set_ylim(values.min() / 2, values.max() * 2)
    if "learning_rate" in log:
        rate = axes.twinx()
        rate.plot(steps, log["learning_rate"], color=GREY, linestyle=":", linewidth=1.2)
        rate.set_ylabel("learning rate (dotted)", color=GREY)
        rate.tick_params(colors=GREY)
        rate.set_ylim(bottom=0)
        rate.spines[["top", "left"]].set_visible(False)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if names:
        axes.legend(frameon=False, loc="upper right")


def _draw_validation(axes: Axes, validation: Mapping[str, Float]) -> None:
    steps = validation["step"]
    shown = {name: label for name, label in MEASURES.items() if name in validation}
    if not shown:
        names = [n for n in (*PRETRAINED, *validation) if n in validation and n not in NOT_LOSSES]
        shown = {n: n.replace("_", " ") for n in names[:1]}
    for i, (name, label) in enumerate(shown.items()):
        axes.plot(steps, validation[name], color=SERIES[i], label=label, marker="o", markersize=3)
    dice = validation.get("dice")
    if dice is not None and np.isfinite(dice).any():
        best = int(np.nanargmax(dice))
        axes.axvline(steps[best], color=RULE, linewidth=1, zorder=0)
        axes.plot(steps[best], dice[best], marker="*", markersize=13, color=SERIES[0], zorder=5)
        title = f"best Dice {dice[best]:.3f} at step {steps[best]:g}"
        axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.margins(y=0.2)
    axes.set_ylabel("validation")
    axes.legend(frameon=False, loc="lower right", ncols=len(MEASURES))


def row_shares(matrix: npt.NDArray[Any]) -> Float:
    """(C, C) each row of counts as shares of its sum; rows without counts are NaN."""
    counts = np.asarray(matrix, np.float64)
    total = counts.sum(axis=1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), np.nan)


def short_count(count: int) -> str:
    """A count in at most five characters: 950, 12.3k, 4.56M, 1.2G."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            value = count / size
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f}{unit}"
    return str(count)


def draw_confusion(path: str | Path, matrix: npt.NDArray[Any], classes: Classes) -> None:
    """Write a confusion matrix as PNG: shares of each true class, with the counts of pixels.

    Args:
        path: the file; it appears when it is complete.
        matrix: (C, C) counts, rows = truth, columns = prediction.
        classes: the C classes.

    Raises:
        UsageError: the matrix is not (C, C).
        OutputError: the file cannot be written.
    """
    counts = np.asarray(matrix)
    number = len(classes)
    if counts.shape != (number, number):
        raise UsageError(f"confusion matrix of shape {counts.shape}; there are {number} classes")
    shares = row_shares(counts)
    cell = min(0.86, 50 / number)  # inches; readers of pictures refuse very large ones
    side, size = 2.2 + cell * max(number, 2), 9 * cell / 0.86
    figure, (axes,) = _figure(1, width=side + 0.9, height=side)
    axes.imshow(np.nan_to_num(shares), cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        count = short_count(int(counts[row, column]))
        text = "none" if math.isnan(share) else f"{share:.1%}\n{count}"
        ink = "white" if share > 0.55 else INK
        axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=size)
    names = [_cut(name) for name in classes.names]
    turned = number > 3
    axes.set_xticks(range(number), names, parse_math=False, rotation_mode="anchor")
    axes.tick_params(axis="x", rotation=40 if turned else 0)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right" if turned else "center")
    axes.set_yticks(range(number), names, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    axes.set_title("Share of each true class, and pixels", loc="left", fontsize=10, color=INK)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    _save(figure, Path(path))


def draw_reliability(path: str | Path, calibration: Mapping[str, Any]) -> None:
    """Write a reliability diagram as PNG: accuracy against confidence, and the pixels of each bin.

    Args:
        path: the file; it appears when it is complete.
        calibration: what `Reliability.summary` gives.

    Raises:
        OutputError: the file cannot be written.
    """
    bins = [row for row in calibration["bins"] if row["count"]]
    figure, (upper, lower) = _figure(2, width=5.4, height=3.1)
    upper.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2, label="as it should be")
    sides, widths = [r["low"] for r in bins], [r["high"] - r["low"] for r in bins]
    accuracy = [r["accuracy"] for r in bins]
    upper.bar(sides, accuracy, widths, align="edge", color=SERIES[5], edgecolor="white")
    means = [r["confidence"] for r in bins]
    upper.plot(means, accuracy, color=SERIES[1], marker="o", markersize=4, label="measured")
    upper.set_ylabel("share that is right")
    upper.set_ylim(0, 1)
    upper.legend(frameon=False, loc="upper left")
    title = f"ECE {calibration['ece']:.3f}, largest gap {calibration['mce']:.3f}"
    upper.set_title(title, loc="left", fontsize=10, color=INK)
    share = [r["count"] / max(1, calibration["pixels"]) for r in bins]
    lower.bar(sides, share, widths, align="edge", color=GREY, edgecolor="white")
    lower.set_ylabel("share of the pixels")
    lower.set_xlabel("probability of the most likely class")
    upper.sharex(lower)
    lower.set_xlim(min([0.5, *sides]), 1)
    _save(figure, Path(path))


def draw_label_efficiency(
    path: str | Path, table: Mapping[str, Mapping[int, Sequence[float]]]
) -> None:
    """Write Dice against the number of labelled images as PNG, a line for each method.

    Points are single seeds, the line is their mean, the band goes from the smallest to the largest.

    Args:
        path: the file; it appears when it is complete.
        table: method -> number of labelled images -> Dice of each seed.

    Raises:
        UsageError: nothing to draw.
        OutputError: the file cannot be written.
    """
    counts = sorted({n for row in table.values() for n, values in row.items() if values})
    if not counts:
        raise UsageError(f"{path}: no method has a value; nothing to draw")
    figure, (axes,) = _figure(1, width=7.2, height=4.6)
    for i, (method, row) in enumerate(table.items()):
        colour = SERIES[i % len(SERIES)]
        xs = [n for n in sorted(row) if row[n]]
        columns = [np.asarray(row[n], np.float64) for n in xs]
        means = [c.mean() for c in columns]
        axes.plot(xs, means, color=colour, marker="o", label=method)
        low, high = [c.min() for c in columns], [c.max() for c in columns]
        axes.fill_between(xs, low, high, color=colour, alpha=0.14, linewidth=0)
        for n, column in zip(xs, columns, strict=True):
            axes.plot([n] * len(column), column, ".", color=colour, alpha=0.55, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.set_xlabel("labelled images")
    axes.set_ylabel("Dice (mean; band and points: seeds)")
    for text in axes.legend(frameon=False, loc="lower right").get_texts():
        text.set_parse_math(False)
    _save(figure, Path(path))


def _cut(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else f"{name[: longest - 3]}..."


def _figure(rows: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` plain axes, each `height` inches high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), layout="constrained", facecolor="white")
    axes = [figure.add_subplot(rows, 1, i + 1) for i in range(rows)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color(GREY)
        one.tick_params(colors=INK, labelsize=9)
        one.grid(color=RULE, linewidth=0.5, alpha=0.6)
        one.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with staged(path) as (temporary,):
        figure.savefig(temporary, format="png", dpi=DPI)
