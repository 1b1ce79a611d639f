"""The files of an evaluation: numbers, table, pictures, report. Measures nothing itself.

metrics.json is taken away before the others are written and comes last: where it stands, all stand.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wsiseg.atomic import staged
from wsiseg.classes import Classes
from wsiseg.datasets.base import LabelledDataset, class_pixels
from wsiseg.errors import DatasetError, OutputError
from wsiseg.models.segmenter import Segmenter
from wsiseg.training.contents import contents_of
from wsiseg.training.curves import draw_confusion, draw_reliability
from wsiseg.training.evaluate import Evaluation, Measuring, predict_item
from wsiseg.training.findings import found_labels
from wsiseg.training.panels import panel_file, write_panel
from wsiseg.training.published import published_rows
from wsiseg.training.report import Pictures, write_report

_OF_LABELS = ("classes", "ignore", "terms", "group", "parts", "masks", "instances", "cache_mb")
"""Options of data sets that say nothing of the images."""
_OF_CUTTING = ("cut", "patch_px", "stride_px", "max_ignored", "min_labelled", "mpp")
"""Options of how images are cut out of files."""


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


def warn_of_training_images(
    card: Mapping[str, Any], described: Mapping[str, Any], dataset: LabelledDataset, *, part: str
) -> None:
    """Warn where a model has learnt from the images that it is to be measured on.

    Its card, and those of what it was trained from, which lie inside, hold checksums of images;
    those of earlier versions only names. Of the same part of a data set groups tell, too: of the
    same patients there may be images that were not trained on, or images cut in another way.

    Args:
        card: the model's.
        described: options of the data set.
        dataset: what is to be measured; its images are read if the card holds checksums.
        part: of the data set.

    Raises:
        DatasetError, SlideError: an image cannot be read.
    """
    cards = list(_cards(card))
    contents: Sequence[str] = ()
    if any(_listed(about, "training_contents") for about in cards):
        contents = contents_of(dataset, range(len(dataset))).images
    seen: set[int] = set()
    grouped: set[int] = set()
    for about in cards:
        held = _listed(about, "training_contents")
        own = about.get("dataset")
        own = own if isinstance(own, Mapping) else None
        if held:
            seen |= _places(contents, held)
        elif own is not None and _fits(own, described, but=_OF_LABELS):
            seen |= _places(dataset.names, _listed(about, "training_images"))
        if (
            own is not None
            and own.get("part") == part
            and _fits(own, described, but=(*_OF_LABELS, *_OF_CUTTING))
            and not (held and _others(about, described, dataset.names, contents))
        ):
            grouped |= _places(dataset.groups, _listed(about, "training_groups"))
    if seen or grouped:
        what = "were in" if len(seen) >= len(grouped) else "are of patients or slides of"
        warnings.warn(
            f"{max(len(seen), len(grouped))} of the {len(dataset)} images {what} the model's "
            "training: these numbers do not say how good it is",
            stacklevel=2,
        )


def _cards(card: Any) -> Iterator[Mapping[str, Any]]:
    """A card, then those of what the model was trained from, which lie inside."""
    while isinstance(card, Mapping):
        yield card
        card = card.get("extractor")


def _places(values: Sequence[str], known: Sequence[str]) -> set[int]:
    """Where in `values` those stand that are among the `known`."""
    among = set(known)
    return {i for i, value in enumerate(values) if value in among}


def _others(
    card: Mapping[str, Any],
    described: Mapping[str, Any],
    names: Sequence[str],
    contents: Sequence[str],
) -> bool:
    """Whether images of the same names are others than those of a card: another folder's, whose
    groups say nothing. Of images cut from larger ones that cannot be told."""
    trained = _listed(card, "training_images"), _listed(card, "training_contents")
    held = dict(zip(*trained, strict=False))
    changed = any(held.get(n, c) != c for n, c in zip(names, contents, strict=True))
    return "patch_px" not in described and changed


def _fits(own: Mapping[str, Any], described: Mapping[str, Any], *, but: Sequence[str]) -> bool:
    """Whether options of a data set are those that a card names."""
    return all(own.get(k) == v for k, v in described.items() if k not in but)


def _listed(card: Mapping[str, Any], key: str) -> list[str]:
    """The names or checksums that a card lists."""
    listed = card.get(key)
    return listed if isinstance(listed, list) else []


def claim_results(out: Path) -> None:
    """Make the folder and see that it can be written; earlier results stay for now.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".probe").touch()
        (out / ".probe").unlink()
    except OSError as e:
        raise OutputError(f"{out}: cannot be written ({e.strerror or e})") from e


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
    (out / "metrics.json").unlink(missing_ok=True)
    _write_table(out / "per_image.csv", result.per_image)
    images = _plots(out, result, dataset.classes)
    names = chosen(result.per_image, panels)
    images["panels"] = _draw(out / "panels", segmenter, dataset, how, names)
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
    (out / "reliability.png").unlink(missing_ok=True)  # of an earlier evaluation
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
    for name in dataset.names:  # of an earlier evaluation
        (folder / panel_file(name)).unlink(missing_ok=True)
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
