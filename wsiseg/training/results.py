"""The files of an evaluation: numbers, table, pictures, report. Measures nothing itself.

metrics.json is taken away before the others are written and comes last: where it stands, all stand.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wsiseg.atomic import staged
from wsiseg.classes import Classes
from wsiseg.datasets.base import LabelledDataset, class_pixels
from wsiseg.errors import DatasetError, OutputError
from wsiseg.models.segmenter import Segmenter
from wsiseg.training.curves import draw_confusion, draw_reliability
from wsiseg.training.evaluate import Evaluation, Measuring, predict_item
from wsiseg.training.findings import found_labels
from wsiseg.training.panels import panel_file, write_panel
from wsiseg.training.published import published_rows
from wsiseg.training.report import Pictures, write_report

PANELS = "panels"


def check_labelled(dataset: LabelledDataset) -> None:
    """See that there is something to measure on; all masks are read.

    Raises:
        DatasetError: no mask has a labelled pixel, or one holds a value that is no class.
    """
    if not class_pixels(dataset, range(len(dataset))).any():
        raise DatasetError(
            f"none of the {len(dataset)} images has a labelled pixel, so there is nothing to "
            "measure; choose another --split or --fold, or see which values the options ignore"
        )


def claim_results(out: Path) -> None:
    """Make the folder and see that it and its panels/ can be written; earlier results stay for now.

    Raises:
        OutputError: one of them cannot be written.
    """
    for folder in (out, out / PANELS):
        try:
            if folder == out:
                folder.mkdir(parents=True, exist_ok=True)
            if folder.exists():
                (folder / ".probe").touch()
                (folder / ".probe").unlink()
        except OSError as e:
            raise OutputError(f"{folder}: cannot be written ({e.strerror or e})") from e


def write_results(
    out: Path,
    result: Evaluation,
    segmenter: Segmenter,
    *,
    dataset: LabelledDataset,
    about: Mapping[str, Any],
    panels: int,
) -> dict[str, Any]:
    """Write metrics.json, per_image.csv, confusion.png, panels/ and report.html.

    reliability.png too, where calibration was measured.

    Args:
        out: folder of `claim_results`.
        result: what was measured.
        segmenter: the model, for the pictures.
        dataset: the images.
        about: dataset, split, fold and command, for the record.
        panels: how many images to draw: the worst, the middle and the best.

    Returns:
        The content of metrics.json.

    Raises:
        OutputError: a file cannot be written.
    """
    info, how = segmenter.info, result.how
    report: dict[str, Any] = {
        "model": info.name,
        "sha256": info.sha256,
        "licence": info.licence,
        **about,
        "classes": list(dataset.classes.names),
        "tta": how.tta,
        "seeds": list(how.seeds),
        "min_object_um2": how.min_object_um2,
        "fill_holes": how.fill_holes,
        "raw": how.raw,
        **result.summary(),
        "calibration": result.calibration,
    }
    _remove(out / "metrics.json")
    for name in (*dataset.names, *_measured(out / "per_image.csv")):
        _remove(out / PANELS / panel_file(name))
    _write_table(out / "per_image.csv", result.per_image)
    images = _plots(out, result, dataset.classes)
    names = chosen(result.per_image, panels)
    images["panels"] = _draw(out / PANELS, segmenter, dataset, how, names)
    write_report(
        out / "report.html",
        report,
        classes=dataset.classes,
        rows=result.per_image,
        images=images,
        published=() if about["fold"] else published_rows(about["dataset"], about["split"]),
    )
    with staged(out / "metrics.json") as (temporary,):
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    return report


def chosen(rows: Mapping[str, Mapping[str, float]], count: int) -> list[str]:
    """Names of the images with the lowest, the middle and the highest Dice, a third each."""
    names = sorted(rows, key=lambda n: rows[n]["dice"])
    if len(names) <= count:
        return names
    low, middle = -(-count // 3), count // 3
    high = count - low - middle
    start = max(low, (len(names) - middle) // 2)
    return [*names[:low], *names[start : start + middle], *names[len(names) - high :]]


def _plots(out: Path, result: Evaluation, classes: Classes) -> Pictures:
    """Draw the confusion matrix, and reliability where it was measured."""
    images: Pictures = {"confusion": out / "confusion.png"}
    draw_confusion(out / "confusion.png", np.asarray(result.pixel["confusion"]), classes)
    _remove(out / "reliability.png")
    if result.calibration is not None:
        images["reliability"] = out / "reliability.png"
        draw_reliability(out / "reliability.png", result.calibration)
    return images


def _draw(
    folder: Path,
    segmenter: Segmenter,
    dataset: LabelledDataset,
    how: Measuring,
    names: list[str],
) -> list[Path]:
    index = {name: i for i, name in enumerate(dataset.names)}
    paths = []
    for name in names:
        item = dataset[index[name]]
        prediction = predict_item(segmenter, dataset, item, how)
        paths.append(folder / panel_file(name))
        write_panel(
            paths[-1],
            item.image,
            item.mask,
            found_labels(prediction, segmenter.info, mpp=dataset.mpp, raw=how.raw),
            dataset.classes,
            uncertainty=prediction.uncertainty,
        )
    return paths


def _measured(table: Path) -> list[str]:
    """Names of the images in the table of an earlier evaluation, if there is one."""
    try:
        with table.open(newline="", encoding="utf-8") as file:
            return [row[0] for row in csv.reader(file) if row][1:]
    except (OSError, ValueError, csv.Error):  # missing, or no such table
        return []


def _remove(path: Path) -> None:
    """Remove a file of an earlier evaluation, if it is there.

    Raises:
        OutputError: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as e:
        raise OutputError(f"{path}: cannot be removed ({e.strerror or e})") from e


def _write_table(path: Path, rows: Mapping[str, Mapping[str, float]]) -> None:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    with (
        staged(path) as (temporary,),
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["name", *columns])
        for name, row in rows.items():
            writer.writerow([name, *(f"{row[c]:.6f}" if c in row else "" for c in columns)])
