"""`wsiseg pretrain`: extractors from unlabelled tissue."""

from __future__ import annotations

from pathlib import Path

import click

from wsiseg.cli.say import LESS_MEMORY, PATH, THERE


@click.command("pretrain")
@click.argument("stages", nargs=-1)
@click.option(
    "--config", required=True, help="YAML of all stages, or a shipped one such as glas-small."
)
@click.option("--data", type=THERE, required=True, help="Folder that the sources are below.")
@click.option("--out", type=PATH, required=True, help="Run folder; made if missing.")
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
    config: str,
    data: Path,
    out: Path,
    settings: tuple[str, ...],
    resume: bool,
    device: str,
) -> None:
    """Pretrain STAGES (default: all of the configuration, one after the other).

    PathSegDiff has the stages encoder, autoencoder and ldm, the pixel-space denoisers (an extractor
    with a name, genselfdiff or ddpm) have the one stage ddpm. Writes OUT/extractor.safetensors,
    which `wsiseg train --extractor` takes, and what the stages hand on before it; numbers and
    pictures of each stage lie in OUT/STAGE. Several processes: `accelerate launch -m wsiseg.cli
    pretrain`.
    """
    from wsiseg.config import apply_overrides, find_config, load_yaml
    from wsiseg.errors import ConfigError
    from wsiseg.inference.memory import memory_said
    from wsiseg.models.devices import pick_device
    from wsiseg.training.pretrain import check_stages, pretrain
    from wsiseg.training.pretrain_config import chosen_stages, pretrain_config
    from wsiseg.training.processes import Processes, device_of_process

    mapping = apply_overrides(load_yaml(find_config(config, "pretrain")), settings)
    try:
        run = pretrain_config(mapping)
    except ConfigError as e:
        raise ConfigError(f"--config {config}{' with --set' if settings else ''}: {e}") from e
    own = device_of_process(device)
    chosen = chosen_stages(run, stages)
    check_stages(chosen, run, out=out, resume=resume)
    for stage in chosen:
        with memory_said(pick_device(own), advice=LESS_MEMORY):
            written = pretrain(stage, run, data=data, out=out, resume=resume, device=own)
        if Processes().first:
            click.echo(f"wrote {written}")
    Processes().end()
