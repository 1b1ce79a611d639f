"""`wsiseg pretrain`: the frozen parts of PathSegDiff from unlabelled tissue."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("pretrain")
@click.argument("stages", nargs=-1, type=click.Choice(["encoder", "autoencoder", "ldm"]))
@click.option("--config", "config_path", type=Path, required=True, help="YAML of all stages.")
@click.option("--data", type=Path, required=True, help="Folder that the sources are below.")
@click.option("--out", type=Path, required=True, help="Run folder; made if missing.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="A.B=V",
    help="Change a setting, e.g. ldm.loop.steps=200; several times for several.",
)
@click.option("--resume", is_flag=True, help="Continue a run that was stopped.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, mps.")
def command(
    stages: tuple[str, ...],
    config_path: Path,
    data: Path,
    out: Path,
    settings: tuple[str, ...],
    resume: bool,
    device: str,
) -> None:
    """Pretrain STAGES (default: encoder, autoencoder and ldm, one after the other).

    Writes OUT/encoder.safetensors, OUT/autoencoder.safetensors and OUT/extractor.safetensors,
    which `wsiseg train --extractor` takes.
    """
    from wsiseg.config import apply_overrides, from_mapping, load_yaml
    from wsiseg.training.pretrain import STAGES, PretrainConfig, pretrain

    mapping = apply_overrides(load_yaml(config_path), settings)
    config = from_mapping(PretrainConfig, mapping)
    for stage in STAGES:
        if not stages or stage in stages:
            written = pretrain(stage, config, data=data, out=out, resume=resume, device=device)
            click.echo(f"wrote {written}")
