"""`wsiseg train`: a segmenter on labelled images."""

from __future__ import annotations

from pathlib import Path

import click

from wsiseg.cli.say import LESS_MEMORY, PATH, THERE


@click.command("train")
@click.option(
    "--dataset",
    "name",
    required=True,
    help="bcss, glas, pannuke, qupath, wsss4luad, consep, or a YAML file (folder and options).",
)
@click.option("--data", type=THERE, required=True, help="Folder of the data set.")
@click.option("--split", help="Part to train on; default train (pannuke: lowdata-train).")
@click.option("--fold", metavar="K/N", help="Leave out fold K of N (whole patients).")
@click.option(
    "--limit", type=click.IntRange(1), help="Labelled images to train on, drawn by the seed."
)
@click.option(
    "--extractor",
    help="Extractor: a file of `wsiseg pretrain` or `wsiseg models import`, a checkpoint, or a "
    "model's name. Without it the configuration's, and without one there pathsegdiff-brca.",
)
@click.option("--out", type=PATH, required=True, help="Run folder; made if missing.")
@click.option(
    "--config",
    help="YAML of the run, or a shipped one such as glas/res-unet or small/res-unet; without it "
    "the paper's for bcss, glas and pannuke, and `annotations` for folder and qupath.",
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
    split: str | None,
    fold: str | None,
    limit: int | None,
    extractor: str | None,
    out: Path,
    config: str | None,
    settings: tuple[str, ...],
    with_head: bool,
    resume: bool,
    device: str,
) -> None:
    """Train a head on an extractor, which stays frozen unless `trainable` says otherwise.

    Writes OUT/model.safetensors, which `wsiseg predict --model` and `wsiseg evaluate` take, with
    logs, curves and pictures beside it. Several processes: `accelerate launch -m wsiseg.cli train`.
    """
    from wsiseg.config import apply_overrides, find_config, from_mapping, load_yaml
    from wsiseg.datasets.base import Subset, fold_of
    from wsiseg.datasets.table import DATASETS, dataset_mapping, open_dataset
    from wsiseg.errors import ConfigError
    from wsiseg.inference.memory import memory_said
    from wsiseg.models.devices import pick_device
    from wsiseg.training.processes import Processes, device_of_process
    from wsiseg.training.start import starting_point
    from wsiseg.training.train import TrainConfig, train

    described = dataset_mapping(name)
    entry = DATASETS[described["name"]]
    chosen, split = config or entry.training, split or entry.part
    mapping = apply_overrides(load_yaml(find_config(chosen, "train")), settings)
    if limit is not None:
        mapping["limit"] = limit
    try:
        run = from_mapping(TrainConfig, mapping)
    except ConfigError as e:
        raise ConfigError(f"--config {chosen}{' with --set' if settings else ''}: {e}") from e
    dataset = open_dataset(described, data, split)
    if dataset.measuring:
        click.echo(f"wsiseg: warning: {split} is for measuring; do not measure on it now", err=True)
    if fold is not None:
        dataset = Subset(dataset, fold_of(dataset, fold)[0])
    own = device_of_process(device)
    start = starting_point(run, extractor, with_head=with_head, device=own)
    part = {**described, "part": split, "left out": fold and f"fold {fold}"}
    with memory_said(pick_device(own), advice=LESS_MEMORY):
        path = train(
            start.config,
            dataset,
            start.model,
            out=out,
            resume=resume,
            provenance={"dataset": part, **start.origin},
        )
    Processes().end()
    click.echo(f"wrote {path}")
