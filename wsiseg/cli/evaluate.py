"""`wsiseg evaluate`: a model's metrics on labelled images."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("evaluate")
@click.option("--model", required=True, help="Model: a name or a checkpoint.")
@click.option("--dataset", "name", required=True, help="Data set: glas.")
@click.option("--data", type=Path, required=True, help="Folder of the data set.")
@click.option("--split", required=True, help="Part to measure on: train, testA, testB.")
@click.option("--out", type=Path, required=True, help="Folder for metrics.json and per_image.csv.")
@click.option("--tta", is_flag=True, help="Average over flips and quarter turns.")
@click.option("--seed", default=0, show_default=True, help="Seed of the noise.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, mps.")
def command(
    model: str, name: str, data: Path, split: str, out: Path, tta: bool, seed: int, device: str
) -> None:
    """Measure a model: pooled and per-image accuracy, Dice and IoU."""
    import csv
    import json

    from wsiseg.atomic import staged
    from wsiseg.datasets.table import open_dataset
    from wsiseg.models.checkpoint import load_model
    from wsiseg.training.evaluate import evaluate

    dataset = open_dataset(name, data, split)
    segmenter = load_model(model, device=device)
    with staged(out / "metrics.json", out / "per_image.csv") as (metrics, rows):
        metrics.touch()  # a folder that cannot be written ends here, before the work
        result = evaluate(segmenter, dataset, seed=seed, tta=tta)
        report = {
            "model": segmenter.info.name,
            "sha256": segmenter.info.sha256,
            "dataset": name,
            "split": split,
            "tta": tta,
            "seed": seed,
            **result.summary(),
        }
        metrics.write_text(json.dumps(report, indent=1) + "\n")
        with rows.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["name", "accuracy", "dice", "miou"])
            for image, row in result.per_image.items():
                writer.writerow([image, *(f"{row[n]:.6f}" for n in ("accuracy", "dice", "miou"))])
    pixel = result.pixel
    click.echo(
        f"{name} {split}, {len(result.per_image)} images: accuracy {pixel['accuracy']:.4f}  "
        f"Dice {pixel['dice']:.4f}  mIoU {pixel['miou']:.4f}"
    )
