"""`wsiseg models`: list and show models, import the authors' weights, complete, average."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from wsiseg.cli.say import PATH
from wsiseg.errors import UsageError

OBJECT = ("f1", "dice", "hausdorff")
"""Object scores that a card states."""


@click.group()
def command() -> None:
    """List, show and import models; complete a model's card; average models."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(as_json: bool) -> None:
    """List the models that have a name."""
    from wsiseg.models.describe import list_models

    rows = list_models()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(f"{row['name']}  [{row['state']}]")
        click.echo(f"    {row['summary']}")
        if "classes" in row:
            click.echo(f"    classes: {', '.join(row['classes'])}; {row['mpp']:g} um per pixel")
        click.echo(f"    licence: {row['licence']}")


@command.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--classes",
    "class_count",
    type=click.IntRange(1, 254),
    default=6,
    show_default=True,
    help="Classes of the head, for an architecture without a trained one.",
)
def show(model: str, as_json: bool, class_count: int) -> None:
    """Show parts, feature maps, terms and card of MODEL, a name or a file."""
    from wsiseg.models.describe import describe

    about = describe(model, class_count=class_count)
    if as_json:
        click.echo(json.dumps(about, indent=2))
        return
    for line in _page(about):
        click.echo(line)


@command.command("import")
@click.option("--ldm", required=True, type=PATH, help="The authors' diffusion model (last.ckpt).")
@click.option("--hipt", required=True, type=PATH, help="HIPT (vit256_small_dino.pth).")
@click.option("--out", type=PATH, help="The .safetensors file to write.")
@click.option(
    "--name",
    help="Import as this model: the files must fit its architecture, and without --out they go "
    "where the name is looked for.",
)
@click.option(
    "--arch",
    type=PATH,
    help="YAML with the extractor's configuration, for files whose settings cannot be read off.",
)
@click.option("--ema", is_flag=True, help="Take the U-Net's moving average.")
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Open files that hold other objects than tensors. This runs code that the file names: "
    "only for files that you trust.",
)
def import_command(
    ldm: Path, hipt: Path, out: Path | None, name: str | None, arch: Path | None, **flags: bool
) -> None:
    """Bring the authors' checkpoints into one file, an extractor to train heads on."""
    from wsiseg.models.weights import import_weights

    target, architecture = _target(out, name, arch)
    card = import_weights(ldm, hipt, out=target, arch=architecture, **flags)
    for part, count in card["parameters"].items():
        click.echo(f"{part:<12} {count:>13,} parameters")
    click.echo(f"noise schedule: {card['schedule']}")
    click.echo(f"U-Net weights: {card['unet_weights']}")
    for prefix, count in card["left_out"].items():
        click.echo(f"left out: {count} tensors {prefix}*")
    click.echo(f"written: {target}")


@command.command("card")
@click.argument("model")
@click.option("--add", type=PATH, help="YAML with statements: use, data, licence, limits.")
@click.option("--metrics", multiple=True, type=PATH, help="metrics.json of `wsiseg evaluate`.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="A.B=V",
    help="Change the post-processing or the temperature, e.g. objects.min_area_um2=400.",
)
@click.option(
    "--round",
    "rounded",
    is_flag=True,
    help="Round weights so that bf16 computes with nearly the same ones as fp32 on slides; the "
    "numbers on the card are left out.",
)
@click.option("--out", type=PATH, required=True, help="The .safetensors file to write.")
def card_command(
    model: str,
    add: Path | None,
    metrics: tuple[Path, ...],
    settings: tuple[str, ...],
    rounded: bool,
    out: Path,
) -> None:
    """Write MODEL, a checkpoint or a name, again with more on its card, without training."""
    from wsiseg.config import load_yaml
    from wsiseg.models.card import add_to_card
    from wsiseg.models.storage import sha256_of
    from wsiseg.models.zoo import find

    if metrics and (settings or rounded):
        change = "--set" if settings else "--round"
        raise UsageError(
            f"--metrics were measured before {change}; write that first, measure what is written, "
            "then add it"
        )
    statements, path = load_yaml(add) if add else {}, find(model)[1]
    if path is None:
        raise UsageError(f"{model} has no weights, so it has no card; give a checkpoint")
    measured: dict[str, Any] = {}
    sha256 = sha256_of(path) if metrics else ""
    for file in metrics:
        title, row, other = _measured(file)
        if other != sha256:
            raise UsageError(f"{file}: was measured with another file than {path}; measure this")
        if title in measured:
            raise UsageError(f"{file}: numbers of {title} are given twice; give one of the files")
        measured[title] = row
    if measured:
        statements["metrics"] = measured
    add_to_card(path, statements, out=out, settings=settings, rounded=rounded)
    click.echo(f"written: {out}")


@command.command("average")
@click.argument("models", nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="The .safetensors file to write.")
def average_command(models: tuple[str, ...], out: Path) -> None:
    """Write the mean of the weights of MODELS, which were trained on from one another."""
    from wsiseg.training.average import average_models

    average_models(models, out)
    click.echo(f"written: {out}")


def _measured(path: Path) -> tuple[str, dict[str, Any], str]:
    """Of a metrics.json: what was measured and how, the numbers, the digest of the model."""
    from wsiseg.config import load_yaml

    report = load_yaml(path)  # JSON is YAML
    try:
        row = {k: report["pixel"][k] for k in ("accuracy", "dice", "miou")}
        row |= {f"object {k}": report["object"][k] for k in OBJECT if report.get("object")}
        row |= {"ece": report["calibration"]["ece"]} if report.get("calibration") else {}
        row |= {k: report[k] for k in ("images", "tta", "seeds")}
        title = [f"{report['dataset']['name']} {report['split']}"]
        title += [f"fold {report['fold']}"] if report["fold"] else []
        title += ["TTA"] if report["tta"] else []
        title += ["without its post-processing"] if report.get("raw") else []
        title += ["holes filled"] if report.get("fill_holes") else []
        least = report.get("min_object_um2")
        title += [f"objects from {least:g} um2"] if least else []
        return ", ".join(title), row, report["sha256"]
    except (KeyError, TypeError, ValueError) as e:
        raise UsageError(f"{path}: not a metrics.json of wsiseg evaluate") from e


def _target(
    out: Path | None, name: str | None, arch: Path | None
) -> tuple[Path, Mapping[str, Any] | None]:
    """Where to write, and the architecture that the files must fit (None: read off them)."""
    from wsiseg.config import load_yaml
    from wsiseg.models.zoo import MODELS

    names = [e.name for e in MODELS.values() if e.weights == "imported" and not e.shares]
    if name is not None and name not in names:
        raise UsageError(f"--name {name}: must be one of {', '.join(names)}")
    entry = MODELS[name] if name else None
    target = out or (entry.path if entry else None)
    if target is None:
        raise UsageError("give --out FILE.safetensors or --name MODEL")
    if arch is not None:
        return target, {"name": "pathsegdiff", **load_yaml(arch)}
    return target, entry.extractor if entry else None


def _page(about: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a description for people."""
    config, trained = about["config"], about["trained_head"]
    yield about["name"]
    for key in ("summary", "state", "kind", "licence"):
        if key in about:
            yield f"  {key}: {about[key]}"
    tile = config["extractor"]["tile_px"]
    where = "" if config["mpp"] is None else f" at {config['mpp']:g} um per pixel"
    yield f"  window {config['window_px']} px{where}, tile {tile} px"
    if trained:
        yield "classes"
        for row in config["classes"]:
            note = "  (background)" if row["background"] else ""
            yield f"  {row['value']:>3}  {row['name']}{note}"
        settings = {"temperature": config["temperature"], **config["objects"]}
        yield f"post-processing: {', '.join(f'{k} {v:g}' for k, v in settings.items())}"
    yield "parameters" + ("" if trained else f" (for {about['class_count']} classes)")
    for part in (*about["parts"], "total"):
        yield f"  {part:<12} {about[part]:>13,}"
    yield from _feature_lines(about["features"])
    titles = {"sources": "where the original weights are obtained", "card": "card"}
    for key, title in titles.items():
        if key in about:
            yield title
            data = _short(about[key]) if key == "card" else about[key]
            yield from _nested(data, "  ")


def _feature_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "feature maps of a tile"
    yield "  tap  block         t  channels  stride  side"
    for row in rows:
        step = "-" if row["timestep"] is None else row["timestep"]
        yield (
            f"  {row['tap']:>3}  {row['block']:<10} {step:>4} {row['channels']:>9} "
            f"{row['stride']:>7} {row['side']:>5}"
        )
    yield f"  together {sum(r['channels'] for r in rows):>22}"


_LONG = {
    "training_images": "names",
    "training_groups": "names",
    "validation_groups": "names",
    "training_contents": "checksums",
    "background_contents": "checksums",
    "ancestors": "records",
}
"""Lists of a card that are not for people."""


def _short(card: Mapping[str, Any]) -> dict[str, Any]:
    """A card for people: what it says of use first, long records as a word."""
    first = [key for key in ("use", "classes", "metrics", "limits", "data", "terms") if key in card]
    short = {key: card[key] for key in (*first, *(k for k in card if k not in first))}
    for key, what in _LONG.items():
        if isinstance(short.get(key), list):
            short[key] = f"{len(short[key])} {what} (--json lists them)"
    for key in ("training", "extractor"):
        if isinstance(short.get(key), Mapping):
            short[key] = "a record of its own (--json shows it)"
    if isinstance(metrics := short.get("metrics"), Mapping):
        short["metrics"] = {title: _in_a_line(row) for title, row in metrics.items()}
    return short


def _in_a_line(row: Any) -> Any:
    """Numbers by name as text; what is no such row stays."""
    if not isinstance(row, Mapping):
        return row
    values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _nested(data: Any, indent: str) -> Iterator[str]:
    """Plain data as indented lines."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}"
            yield from _nested(value, indent + "  ")
        elif isinstance(value, list) and any(" " in v for v in value if isinstance(v, str)):
            yield f"{indent}{key}:"  # sentences and commands: a line each, to be read and copied
            yield from (f"{indent}  {v}" for v in value)
        elif isinstance(value, list):
            yield f"{indent}{key}: {', '.join(str(v) for v in value)}"
        else:
            yield f"{indent}{key}: {value}"
