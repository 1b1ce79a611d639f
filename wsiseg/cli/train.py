"""`wsiseg train`: a head on labelled images."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("train")
@click.option("--dataset", "name", required=True, help="Data set: glas.")
@click.option("--data", type=Path, required=True, help="Folder of the data set.")
@click.option("--split", default="train", show_default=True, help="Part to train on.")
@click.option("--extractor", required=True, help="Extractor: a file, or a model's name.")
@click.option("--out", type=Path, required=True, help="Run folder.")
@click.option("--config", "config_path", type=Path, help="YAML of the run.")
@click.option("--set", "settings", multiple=True, metavar="A.B=V", help="Change a setting.")
@click.option("--resume", is_flag=True, help="Continue a run that was stopped.")
def command(
    name: str,
    data: Path,
    split: str,
    extractor: str,
    out: Path,
    config_path: Path | None,
    settings: tuple[str, ...],
    resume: bool,
) -> None:
    """Train a head on the frozen features of an extractor.

    Writes OUT/model.safetensors, which `wsiseg predict --model` and `wsiseg evaluate` take.
    """
    from wsiseg.config import apply_overrides, from_mapping, load_yaml
    from wsiseg.datasets.table import open_dataset
    from wsiseg.models.checkpoint import load_extractor, read_card
    from wsiseg.training.train import TrainConfig, train

    mapping = apply_overrides(load_yaml(config_path) if config_path else {}, settings)
    config = from_mapping(TrainConfig, mapping)
    dataset = open_dataset(name, data, split)
    network = load_extractor(extractor, device="cpu", options=config.extractor)
    provenance = {"dataset": {"name": name, "part": split}}
    if Path(extractor).is_file():
        provenance["extractor"] = read_card(extractor)["card"]
    path = train(config, dataset, network, out=out, resume=resume, provenance=provenance)
    click.echo(f"wrote {path}")
