"""One table from the folds of a cross-validation: the pixels of all folds in one matrix.

    python examples/pool_folds.py runs/luad-1/fold runs/luad-2/fold runs/luad-3/fold

Each folder holds the metrics.json of `wsiseg evaluate --fold K/N`. Printed are accuracy and, by
class, Dice and IoU of each fold and of all of them; a class that no label of a fold has is left out
of its means.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from wsiseg.classes import Classes, TissueClass
from wsiseg.training.metrics import Matrix, pixel_metrics

HOW = ("classes", "dataset", "split", "tta", "seeds", "raw")
"""What must be the same in all folds, beside their number."""


def read(folder: Path) -> tuple[str, dict[str, Any], Matrix]:
    """Fold, what was measured how, and matrix of an evaluation.

    Raises:
        SystemExit: the folder holds none.
    """
    try:
        found = json.loads((folder / "metrics.json").read_text())
        fold = str(found["fold"])
        how = {"of": fold.partition("/")[2], **{key: found[key] for key in HOW}}
        return fold, how, np.array(found["pixel"]["confusion"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SystemExit(f"{folder}: no metrics.json of wsiseg evaluate ({e!r})") from e


def line(title: str, matrix: Matrix, names: list[str]) -> str:
    """A row of the table, in Markdown."""
    rows = tuple(TissueClass(name, (0, 0, 0)) for name in names)
    found: dict[str, Any] = pixel_metrics(matrix, Classes(rows), only_labelled=True)
    values = [found["accuracy"], found["dice"], found["miou"]]
    for name, labelled in zip(names, matrix.any(axis=1), strict=True):
        own = found["per_class"][name] if labelled else {}
        values += [own.get("dice"), own.get("iou")]
    return " | ".join([f"| {title}", *("" if v is None else f"{v:.3f}" for v in values)]) + " |"


def main() -> None:
    """Read, add up, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    folds = [read(folder) for folder in parser.parse_args().folders]
    how = folds[0][1]
    if any(own != how for _, own, _ in folds) or len({k for k, _, _ in folds}) < len(folds):
        raise SystemExit("the folders must be different folds of one data set, measured alike")
    names = [str(name) for name in how["classes"]]
    heads = [f"{what} {name}" for name in names for what in ("Dice", "IoU")]
    print(" | ".join(["| fold", "accuracy", "Dice", "mIoU", *heads]) + " |")
    print("|" + "---|" * (4 + len(heads)))
    for fold, _, matrix in folds:
        print(line(fold, matrix, names))
    print(line("all", np.sum([m for _, _, m in folds], axis=0), names))


if __name__ == "__main__":
    main()
