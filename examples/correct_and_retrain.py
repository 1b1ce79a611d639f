"""Predict, correct, train again, predict again, on a synthetic slide; about a minute on a CPU.

    python examples/correct_and_retrain.py [FOLDER]

makes in FOLDER (default retrained) what a user makes with QuPath:

1. `wsiseg predict slides/colon.tif --out first --all-classes` writes first/colon.geojson.
2. Drag that file onto the slide in QuPath. Correct it: unlock an annotation, change its class or
   its border, delete what is wrong or doubtful (what is not annotated takes no part in training)
   and draw what was missed; where two lie on one another the smaller counts. A few regions are
   enough. Then File > Export objects as GeoJSON to slides/colon.geojson.
   Here `correct` stands for the user: it deletes the model's glands, draws the three that are
   there and some stroma that was taken for one, and renames "Other tissue" to "Stroma".
3. `wsiseg train --dataset qupath --data slides ...` learns the classes that it finds there. With
   several slides, whole slides are kept for validation; here is one, so validation_share is 0.
4. `wsiseg predict --model run/model.safetensors` with the new model.

For options (resolution, names of classes, boxes inside which all is annotated, slides kept for
measuring) copy configs/datasets/qupath.yaml and give it to --dataset.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

COLOURS = {"Gland": [60, 160, 75], "Stroma": [150, 200, 150]}
DRAWN = (
    ("Gland", 258, 150, 77, 60),
    ("Gland", 422, 161, 60, 50),
    ("Gland", 360, 290, 55, 57),
    ("Stroma", 500, 225, 20, 32),
)
"""Class, centre and radii of ellipses, in pixels of the slide."""
FAST = [  # a real run needs none of these
    "loop.steps=40",
    "loop.batch_size=2",
    "loop.warmup_steps=5",
    "loop.precision=fp32",
    "feature_cache.patches=6",
    "patch_tiles=[1, 1]",
]


def wsiseg(*words: str | Path) -> None:
    """Run a command of wsiseg and stop if it fails."""
    print("\n$ wsiseg", *words, flush=True)
    subprocess.run([sys.executable, "-m", "wsiseg.cli", *map(str, words)], check=True)


def drawn(name: str, x: float, y: float, width: float, height: float) -> dict[str, Any]:
    """An annotation as QuPath exports it: an ellipse."""
    angles = [2 * math.pi * i / 40 for i in range(40)]
    ring = [[x + width * math.cos(a), y + height * math.sin(a)] for a in angles]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
        "properties": {
            "objectType": "annotation",
            "classification": {"name": name, "color": COLOURS[name]},
        },
    }


def correct(exported: Path, corrected: Path) -> None:
    """Write a GeoJSON file again with glands drawn anew and a class renamed."""
    features = json.loads(exported.read_text(encoding="utf-8"))["features"]
    kept = [f for f in features if f["properties"]["classification"]["name"] == "Other tissue"]
    for feature in kept:
        feature["properties"]["classification"] = {"name": "Stroma", "color": COLOURS["Stroma"]}
    collection = {"type": "FeatureCollection", "features": [*kept, *(drawn(*d) for d in DRAWN)]}
    corrected.write_text(json.dumps(collection), encoding="utf-8")
    print(f"\n{len(features) - len(kept)} annotations deleted, {len(DRAWN)} drawn in {corrected}")


def main(folder: Path) -> None:
    """The whole loop in a folder."""
    slides, run = folder / "slides", folder / "run"
    slides.mkdir(parents=True, exist_ok=True)
    slide = slides / "colon.tif"

    wsiseg("phantom", slide, "--size", "700x500", "--mpp", "1.0", "--seed", "3")
    wsiseg("predict", slide, "--out", folder / "first", "--all-classes")
    correct(folder / "first" / "colon.geojson", slides / "colon.geojson")
    settings = [word for text in [*FAST, "validation_share=0"] for word in ("--set", text)]
    data: list[str | Path] = ["--dataset", "qupath", "--data", slides, "--extractor", "glas-small"]
    wsiseg("train", *data, *settings, "--out", run)
    wsiseg("predict", slide, "--model", run / "model.safetensors", "--out", folder / "second")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("retrained"))
    main(parser.parse_args().folder)
