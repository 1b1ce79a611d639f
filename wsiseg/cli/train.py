"""`wsiseg train`: a head on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("train")
@click.option("--dataset", "name", required=True, help="Data set: glas.")
@click.option("--data", type=Path, required=True, help="Folder of the data set.")
@click.option("--split", default="train", show_default=True, help="Part to train on.")
@click.option(
    "--extractor",
    required=True,
    help="Extractor: a file of `wsiseg pretrain` or `wsiseg models import`, a checkpoint, or a "
    "model's name.",
)
@click.option("--out", type=Path, required=True, help="Run folder; made if missing.")
@click.option(
    "--config", "config_path", type=Path, help="YAML of the run; without it the defaults."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="A.B=V",
    help="Change a setting, e.g. loop.steps=200; several times for several.",
)
@click.option(
    "--with-head",
    is_flag=True,
    help="--extractor is a trained model: go on with its head instead of a new one.",
)
@click.option("--resume", is_flag=True, help="Continue a run that was stopped.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, mps.")
def command(
    name: str,
    data: Path,
    split: str,
    extractor: str,
    out: Path,
    config_path: Path | None,
    settings: tuple[str, ...],
    with_head: bool,
    resume: bool,
    device: str,
) -> None:
    """Train a head on the features of an extractor, frozen unless `trainable` says otherwise.

    Writes OUT/model.safetensors, which `wsiseg predict --model` and `wsiseg evaluate` take.
    """
    from wsiseg.config import apply_overrides, from_mapping, load_yaml
    from wsiseg.datasets.table import open_dataset
    from wsiseg.models.checkpoint import load_extractor, load_model, read_card
    from wsiseg.models.zoo import find
    from wsiseg.training.train import TrainConfig, train

    mapping = apply_overrides(load_yaml(config_path) if config_path else {}, settings)
    config = from_mapping(TrainConfig, mapping)
    dataset = open_dataset(name, data, split)
    start = (
        load_model(extractor, device=device)
        if with_head
        else load_extractor(extractor, device=device, options=config.extractor)
    )
    provenance: dict[str, Any] = {"dataset": {"name": name, "part": split}}
    file = find(extractor)[1]
    if file is not None:
        origin = read_card(file)
        provenance["extractor"] = {"licence": origin["licence"], **origin["card"]}
    path = train(config, dataset, start, out=out, resume=resume, provenance=provenance)
    click.echo(f"wrote {path}")
