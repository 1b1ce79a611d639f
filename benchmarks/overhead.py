"""What the pipeline costs around a model that costs nothing, and a peer's beside it.

    python benchmarks/overhead.py --side 8192
    python benchmarks/overhead.py --side 8192 --tiatoolbox /path/to/its/python

The model is a 1x1 convolution of the pixels, its windows 768 px, the slide a synthetic one that is
analysed everywhere. Every label must be that of the convolution applied to the slide's pixels, ties
left out. The cost is the CPU time of all threads from the open slide to the finished canvas, less
that of the model's own calls. TIAToolbox, where the Python of its environment is given, runs the
same slide with the same weights in the same windows, one after the other, on one thread of torch;
99.9 % of its labels must be ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import numpy.typing as npt
import torch
from literal_pipeline import unlike
from shared import run
from stand_ins import trivial_model
from timing import Row, Span, open_row, row_options, timed

from wsiseg.canvas import Canvas
from wsiseg.errors import UsageError
from wsiseg.geometry import Point, Size
from wsiseg.inference.engine import Engine
from wsiseg.inference.predict import PredictOptions, predict_slide
from wsiseg.models.base import Features
from wsiseg.models.segmenter import Segmenter
from wsiseg.slides.phantom import write_phantom
from wsiseg.slides.slide import Slide, open_slide

MAX_SECONDS = 0.03
MIN_PEER = 8.0
MIN_EQUAL = 0.999
PEER = Path(__file__).resolve().with_name("peer_tiatoolbox.py")


@contextmanager
def model_clock(segmenter: Segmenter, span: Span) -> Iterator[None]:
    """Add the time of the model's own calls in this thread to `span.cpu`.

    Putting a window's maps together is the pipeline's work, and done before the clock starts.
    """
    encode, classify = segmenter.tile_features, segmenter.window_probabilities

    def clocked(call: Callable[..., Any], *arguments: Any) -> Any:
        began = time.thread_time()
        try:
            return call(*arguments)
        finally:
            span.cpu += time.thread_time() - began

    def classified(features: Features) -> Any:
        return clocked(classify, tuple(features))

    with (
        mock.patch.object(segmenter, "tile_features", partial(clocked, encode)),
        mock.patch.object(segmenter, "window_probabilities", classified),
    ):
        yield


def wrong_labels(canvas: Canvas, slide: Slide, segmenter: Segmenter) -> int:
    """Labels that are not those of the model applied to the pixels of the slide, ties left out."""
    engine = Engine(segmenter, precision="fp32")
    grid, side = canvas.grid, segmenter.info.tile_px
    wrong = 0
    for y in range(0, grid.size.height, side):
        for x in range(0, grid.size.width, side):
            box = grid.box._replace(x=x, y=y, width=side, height=side)
            tile = slide.read(box, grid)
            features = engine.encode([tile], [Point(x, y)])
            windows = tuple(maps[:, None, None] for maps in features)
            values = engine.classify(windows, [Point(x, y)])[0].numpy()
            inside = box.intersection(grid.box)
            labels = canvas.labels(inside)
            wrong += unlike(labels, values[:, : inside.height, : inside.width])
    return wrong


def measure(
    row: Row, slide: Slide, segmenter: Segmenter, folder: Path
) -> tuple[float, npt.NDArray[np.uint8]]:
    """Judge the pipeline; gives its CPU seconds per Mpx, and its labels."""
    options = PredictOptions(overlap_px=segmenter.info.tile_px, workers=1)
    whole, model = Span(), Span()
    with model_clock(segmenter, model), timed(whole):
        canvas = predict_slide(slide, segmenter, folder / "canvas", options=options)
    wrong = wrong_labels(canvas, slide, segmenter)
    row.equal(f"labels are those of the convolution; {wrong} differ", wrong == 0)
    megapixels = canvas.grid.size.width * canvas.grid.size.height / 1e6
    seconds = (whole.cpu - model.cpu) / megapixels
    row.judge("pipeline, CPU seconds per Mpx", seconds, "<=", MAX_SECONDS)
    row.note(
        megapixels=megapixels,
        wall_s_per_mpx=whole.wall / megapixels,
        model_cpu_s_per_mpx=model.cpu / megapixels,
    )
    for part in ("read", "encode", "head", "blend"):
        row.note(**{f"{part}, wall seconds": canvas.record["timings"][part]})
    return seconds, canvas.labels(canvas.grid.box)


def measure_peer(
    row: Row, python: str, path: Path, segmenter: Segmenter, ours: float, own: npt.NDArray[np.uint8]
) -> None:
    """Judge the pipeline against TIAToolbox on the same slide.

    Raises:
        UsageError: it cannot be run.
    """
    folder = path.parent
    classifier = segmenter.head.classifier
    assert isinstance(classifier, torch.nn.Conv2d)
    assert classifier.bias is not None
    np.savez(
        folder / "weights.npz",
        weight=classifier.weight.detach().numpy(),
        bias=classifier.bias.detach().numpy(),
    )
    words = [python, str(PEER), str(path), str(folder / "weights.npz"), str(folder / "peer")]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, **threads}
    )
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UsageError(f"--tiatoolbox {python}: the run failed ({last})")
    found = json.loads(done.stdout.splitlines()[-1])
    labels = np.load(folder / "peer.npy")
    equal = float((labels == own - 1).mean()) if labels.shape == own.shape else 0.0
    row.equal(f"labels of TIAToolbox: {100 * equal:.3f} % are ours", equal >= MIN_EQUAL)
    megapixels = found["megapixels"]
    theirs = (found["cpu"] - found["model_cpu"]) / megapixels
    row.judge("pipeline of TIAToolbox / wsiseg, CPU time", theirs / ours, ">=", MIN_PEER)
    row.note(
        tiatoolbox=found["version"],
        tiatoolbox_cpu_s_per_mpx=theirs,
        tiatoolbox_peak_mib=found["peak_mib"],
    )


@click.command(help=__doc__.splitlines()[0])
@row_options
@click.option("--side", default=8192, show_default=True, help="Side of the slide in pixels.")
@click.option("--window", default=768, show_default=True, help="Three tiles.")
@click.option("--tiatoolbox", metavar="PYTHON", help="Python of an environment that has it.")
def main(**words: Any) -> None:
    """Measure the pipeline, then the peer."""
    words["threads"] = words["threads"] or 1
    row = open_row("pipeline overhead", words)
    side, window = words["side"], words["window"]
    segmenter = trivial_model(window_px=window, tile_px=window // 3)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "phantom.tif"
        write_phantom(path, Size(side, side), mpp=segmenter.info.mpp)
        with open_slide(path) as slide:
            slide.read(slide.grid(0.5).box._replace(width=8, height=8), slide.grid(0.5))
            seconds, labels = measure(row, slide, segmenter, Path(name))
        if words["tiatoolbox"]:
            measure_peer(row, words["tiatoolbox"], path, segmenter, seconds, labels)
    row.finish()


if __name__ == "__main__":
    run(main)
