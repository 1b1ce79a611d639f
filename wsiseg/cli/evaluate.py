"""`wsiseg evaluate`: a model against labelled images."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from wsiseg.cli.say import PATH, THERE


@click.command("evaluate")
@click.option("--model", required=True, help="Model: a name or a checkpoint.")
@click.option(
    "--dataset",
    "name",
    required=True,
    help="bcss, glas, pannuke, qupath, wsss4luad, consep, or a YAML file (folder and options).",
)
@click.option("--data", type=THERE, required=True, help="Folder of the data set.")
@click.option("--split", required=True, help="Part to measure on, such as test or testA.")
@click.option("--fold", metavar="K/N", help="Measure on fold K of N only (whole patients).")
@click.option("--out", type=PATH, required=True, help="Folder for tables, pictures and report.")
@click.option("--tta", is_flag=True, help="Average over flips and quarter turns.")
@click.option(
    "--seeds", default=1, show_default=True, type=click.IntRange(1), help="Noise seeds to average."
)
@click.option("--seed", default=0, show_default=True, help="First seed of the noise.")
@click.option(
    "--min-object-um2",
    default=0.0,
    type=float,
    help="Leave smaller predicted objects out of the object scores.",
)
@click.option("--fill-holes", is_flag=True, help="Fill predicted objects before the object scores.")
@click.option("--raw", is_flag=True, help="Leave out the post-processing of the model.")
@click.option(
    "--panels", default=9, show_default=True, type=click.IntRange(0), help="Images to draw."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, mps.")
def command(
    model: str,
    name: str,
    data: Path,
    split: str,
    fold: str | None,
    out: Path,
    tta: bool,
    seeds: int,
    seed: int,
    min_object_um2: float,
    fill_holes: bool,
    raw: bool,
    panels: int,
    device: str,
) -> None:
    """Measure a model: accuracy, Dice, IoU, and object scores where there are instances.

    Writes OUT/metrics.json, per_image.csv, confusion.png, panels/ and report.html.
    """
    from wsiseg.cli.progress import Progress
    from wsiseg.datasets.base import Subset, fold_of, numbered_as
    from wsiseg.datasets.table import dataset_mapping, open_dataset
    from wsiseg.models.checkpoint import load_model
    from wsiseg.training.evaluate import Measuring, evaluate
    from wsiseg.training.learnt import warn_of_training_images
    from wsiseg.training.patches import warn_of_enlarging
    from wsiseg.training.results import (
        check_labelled,
        claim_results,
        write_results,
    )

    how = Measuring(tuple(range(seed, seed + seeds)), tta, min_object_um2, fill_holes, raw)
    described = dataset_mapping(name)
    dataset = open_dataset(described, data, split)
    if fold is not None:
        dataset = Subset(dataset, fold_of(dataset, fold)[1])
    segmenter = load_model(model, device=device)
    dataset = numbered_as(dataset, segmenter.info.classes)
    check_labelled(dataset)
    if segmenter.info.resize_px is None:
        warn_of_enlarging(dataset.mpp, segmenter.info.mpp)
    warn_of_training_images(segmenter.info.card, described, dataset, part=split)
    claim_results(out)  # a folder that cannot be written ends here, before the work
    progress = Progress(split, unit="image")
    try:
        result = evaluate(segmenter, dataset, how=how, progress=progress)
    finally:
        progress.close()
    about = {
        "dataset": described,
        "split": split,
        "fold": fold,
        "command": shlex.join(["wsiseg", *sys.argv[1:]]),
    }
    write_results(out, result, segmenter, dataset=dataset, about=about, panels=panels)
    pixel, unlabelled = result.pixel, len(dataset) - len(result.per_image)
    if unlabelled:
        click.echo(f"wsiseg: warning: {unlabelled} images have no labelled pixel", err=True)
    line = (
        f"{described['name']} {split}{f' fold {fold}' if fold else ''}, {len(result.per_image)} "
        f"images: accuracy {pixel['accuracy']:.4f}  Dice {pixel['dice']:.4f}  "
        f"mIoU {pixel['miou']:.4f}"
    )
    if result.object is not None:
        found = result.object
        line += (
            f"  object F1 {found['f1']:.4f}  Dice {found['dice']:.4f}  Hausdorff "
            f"{found['hausdorff']:.1f} px ({found['hausdorff_um']:.0f} um)"
        )
    click.echo(line)
    click.echo(f"wrote {out / 'report.html'}")
