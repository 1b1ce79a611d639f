"""Choose a model's post-processing by cross-validation: thresholds and areas by their scores.

    python examples/choose_objects.py DATA/glas runs/fold1 runs/fold2 runs/fold3

The runs are models of `wsiseg train --fold 1/3`, `2/3` and `3/3`, in that order; each is measured
on its own fold of the training part, so nothing is chosen on what a model was trained with. With
`--folds 3` fewer runs do, those of the first folds. Prints
the best settings by the mean of object F1 and object Dice, as lines for `objects:` in a training
configuration, and what they gave.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from wsiseg.config import to_mapping
from wsiseg.datasets.base import LabelledImage, Subset, fold_of
from wsiseg.datasets.table import dataset_mapping, open_dataset
from wsiseg.models.checkpoint import load_model
from wsiseg.models.segmenter import ModelInfo
from wsiseg.objects import ObjectsConfig
from wsiseg.training.evaluate import Measuring, predict_item
from wsiseg.training.findings import found_labels, found_objects
from wsiseg.training.metrics import confusion_matrix, pixel_metrics
from wsiseg.training.objects import object_scores, pool
from wsiseg.training.sliding import Prediction

GRID = {
    "border_threshold": (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    "join_um": (0.0, 20.0, 40.0, 60.0, 80.0),
    "min_core_um2": (0.0, 100.0, 200.0, 400.0, 800.0, 1600.0),
    "min_area_um2": (0.0, 200.0, 400.0, 800.0, 1600.0),
    "max_hole_um2": (0.0, 500.0, 2000.0, 8000.0),
    "cut_share": (0.25, 0.5, 1.0),
}
STEPS = (
    ("border_threshold", "join_um"),  # a low threshold is of use only where much is joined again
    ("min_core_um2",),
    ("min_area_um2",),
    ("max_hole_um2",),
    ("cut_share",),
)
Found = tuple[LabelledImage, Prediction, ModelInfo]


def main() -> None:
    """Search one step after the other, twice round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of GlaS")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, fold 1 first")
    parser.add_argument("--folds", type=int, help="folds in all; default: as many as runs")
    parser.add_argument("--tta", action="store_true", help="average over flips and quarter turns")
    words = parser.parse_args()
    folds = words.folds or len(words.runs)
    if folds < max(2, len(words.runs)):
        parser.error("give --folds N, 2 or more and no fewer than runs, or a run for each fold")
    found = list(predictions(words.data, words.runs, folds=folds, tta=words.tta))
    mpp = open_dataset(dataset_mapping("glas"), words.data, "train").mpp
    best = ObjectsConfig(min_area_um2=400.0, max_hole_um2=2000.0, min_core_um2=200.0)
    table: dict[ObjectsConfig, dict[str, float]] = {}
    for step in STEPS * 2:
        for values in itertools.product(*(GRID[name] for name in step)):
            config = replace(best, **dict(zip(step, values, strict=True)))
            if config not in table:
                table[config] = scores(found, config, mpp)
                print(line(config, table[config]), flush=True)
        best = max(table, key=lambda c: table[c]["object_f1"] + table[c]["object_dice"])
    print(f"\nbest: {line(best, table[best])}\nobjects: {to_mapping(best)}")


def predictions(data: Path, runs: list[Path], *, folds: int, tta: bool) -> Iterator[Found]:
    """Every image of the training part, as the model that has not seen it predicts it."""
    whole = open_dataset(dataset_mapping("glas"), data, "train")
    for fold, run in enumerate(runs, start=1):
        held = Subset(whole, fold_of(whole, f"{fold}/{folds}")[1])
        model = load_model(str(run / "model.safetensors"), device="cpu")
        for index in range(len(held)):
            item = held[index]
            yield item, predict_item(model, held, item, Measuring(tta=tta)), model.info
        print(f"fold {fold}: {len(held)} images predicted", flush=True)


def scores(found: list[Found], config: ObjectsConfig, mpp: float) -> dict[str, float]:
    """Pixel Dice and the object scores of all images with a post-processing."""
    matrix, objects = np.zeros((2, 2), np.int64), []
    for item, prediction, info in found:
        own = replace(info, objects=config)
        labels = found_labels(prediction, own, mpp=mpp)
        nothing = np.zeros(labels.shape, bool)
        numbers = found_objects(labels, prediction, own, mpp=mpp, ignored=nothing)
        matrix += confusion_matrix(item.mask, labels, 2)
        objects.append(object_scores(numbers, item.instances))
    pooled = pool(objects)
    return {
        "dice": pixel_metrics(matrix, found[0][2].classes)["dice"],
        "object_f1": pooled["f1"],
        "object_dice": pooled["dice"],
        "hausdorff": pooled["hausdorff"],
    }


def line(config: ObjectsConfig, values: dict[str, float]) -> str:
    """A line of the table."""
    settings = " ".join(f"{name} {getattr(config, name):g}" for name in GRID)
    return settings + "  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items())


if __name__ == "__main__":
    main()
