"""Where a model errs on images with annotated objects: how near to edges, and how much by parting.

    python benchmarks/errors.py --model glas-small --data DATA/glas --split testA

Wrong pixels are counted by their distance from the nearest edge between classes of the annotation:
edges are drawn by hand, and what is wrong next to them says little. The object scores are given
once more for objects that are parted as the annotation parts them: each pixel of an object's class
that lies within REACH_UM of an annotated object belongs to the nearest one. The difference is what
touching objects cost that were not parted, and whole ones that were.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from shared import finish, load, run, table

from wsiseg.classes import IGNORE
from wsiseg.datasets.base import LabelledDataset, numbered_as
from wsiseg.datasets.table import dataset_mapping, open_dataset
from wsiseg.errors import UsageError
from wsiseg.models.segmenter import Segmenter
from wsiseg.training.evaluate import Measuring, predict_item
from wsiseg.training.findings import found_labels, found_objects, without_small
from wsiseg.training.objects import object_scores, pool

ENDS_UM = (2.5, 5.0, 10.0, 20.0, math.inf)
"""Upper ends of the distances that are counted together."""
REACH_UM = 10.0
UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]


def from_edges(mask: UInt8) -> npt.NDArray[np.float64]:
    """(H, W) distance of each pixel from the nearest pixel of another class, in pixels.

    Infinite where there is none; ignored pixels are of no class.
    """
    distance = np.full(mask.shape, np.inf)
    for label in np.unique(mask[mask != IGNORE]):
        others = (mask != label) & (mask != IGNORE)
        if others.any():
            own = mask == label
            distance[own] = ndimage.distance_transform_edt(~others)[own]
    return distance


def parted_as(truth: Int32, found: Int32, *, reach_px: float, min_px: float) -> Int32:
    """The pixels of the objects `found`, parted as `truth` (both (H, W), 0 = none) parts them.

    What lies farther than `reach_px` from every true object is parted as found. Objects below
    `min_px` are left out.
    """
    result = np.where(found > 0, found + truth.max(initial=0), 0)
    if truth.any():
        distance, nearest = ndimage.distance_transform_edt(truth == 0, return_indices=True)
        near = (found > 0) & (distance <= reach_px)
        result[near] = truth[tuple(nearest)][near]
    return without_small(result.astype(np.int32), min_px)


def measure(segmenter: Segmenter, dataset: LabelledDataset, *, tta: bool) -> dict[str, Any]:
    """Wrong pixels by distance, and both object scores, of all images.

    Raises:
        UsageError: an image has no annotated objects.
    """
    dataset, info, mpp = numbered_as(dataset, segmenter.info.classes), segmenter.info, dataset.mpp
    counts = np.zeros((2, len(ENDS_UM)), np.int64)  # wrong, all
    scores: dict[str, list[Any]] = {"as found": [], "parted as annotated": []}
    for index in range(len(dataset)):
        item = dataset[index]
        if item.instances is None:
            raise UsageError(f"{item.name}: has no annotated objects; take another data set")
        prediction = predict_item(segmenter, dataset, item, Measuring(tta=tta))
        labels, ignored = found_labels(prediction, info, mpp=mpp), item.mask == IGNORE
        bins = np.digitize(from_edges(item.mask) * mpp, ENDS_UM[:-1], right=True)
        for row, chosen in enumerate(((labels != item.mask) & ~ignored, ~ignored)):
            counts[row] += np.bincount(bins[chosen], minlength=len(ENDS_UM))
        found = found_objects(labels, prediction, info, mpp=mpp, ignored=ignored)
        truth = np.where(ignored, 0, item.instances).astype(np.int32)
        least = info.objects.min_area_um2 / mpp**2
        best = parted_as(truth, found, reach_px=REACH_UM / mpp, min_px=least)
        for name, objects in zip(scores, (found, best), strict=True):
            scores[name].append(object_scores(objects, truth))
    pooled = {name: pool(of) for name, of in scores.items()}
    wrong, pixels = counts.tolist()
    return {"wrong": wrong, "pixels": pixels, "objects": pooled, "images": len(dataset)}


@click.command(help=__doc__.splitlines()[0])
@click.option("--model", default="glas-small", show_default=True, help="Name or file.")
@click.option("--dataset", default="glas", show_default=True, help="Name or YAML file.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Its folder.")
@click.option("--split", required=True, help="Its part.")
@click.option("--tta", is_flag=True, help="Average over flips and quarter turns.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Numbers here.")
def main(model: str, device: str, threads: int | None, json_path: Path | None, **of: Any) -> None:
    """Measure and print; nothing is judged."""
    dataset = open_dataset(dataset_mapping(of["dataset"]), of["data"], of["split"])
    segmenter = load(model, device, threads)
    result = measure(segmenter, dataset, tta=of["tta"])
    total, rows, low = sum(result["wrong"]), [], 0.0
    for high, wrong, pixels in zip(ENDS_UM, result["wrong"], result["pixels"], strict=True):
        name = f"{low:g} to {high:g} um" if high < math.inf else f"above {low:g} um"
        rate = f"{100 * wrong / pixels:.1f} %" if pixels else "-"
        rows.append([name, f"{100 * wrong / max(1, total):.1f} %", rate])
        low = high
    click.echo(table(["from an edge", "of the wrong pixels", "of the pixels wrong"], rows))
    rows = [
        [name, f"{s['f1']:.3f}", f"{s['dice']:.3f}", f"{s['hausdorff']:.1f}"]
        for name, s in result["objects"].items()
    ]
    click.echo(table(["objects", "F1", "Dice", "Hausdorff, px"], rows))
    share = 100 * total / max(1, sum(result["pixels"]))
    verdict = f"{result['images']} images of {of['split']}: {share:.1f} % of the pixels are wrong"
    finish(json_path, segmenter, {**result, "passed": None, "verdict": verdict})


if __name__ == "__main__":
    run(main)
