"""`wsiseg phantom`: a synthetic slide. Knows words, not pixels."""

from __future__ import annotations

import re
from pathlib import Path

import click

from wsiseg.cli.say import PATH


def _parse_size(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX](\d+)", value)
    if match is None:
        raise click.BadParameter(f"write it as WIDTHxHEIGHT, such as 3000x2500, not {value}")
    return int(match[1]), int(match[2])


@click.command("phantom")
@click.argument("out", type=PATH)
@click.option(
    "--size", required=True, callback=_parse_size, metavar="WxH", help="Level 0 in pixels."
)
@click.option("--mpp", type=float, default=0.5, show_default=True, help="Micrometres per pixel.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides every detail.")
@click.option(
    "--truth",
    type=PATH,
    help="Also write the truth: a TIFF with 0 = glass, 1 = stroma, 2 = gland.",
)
def command(out: Path, size: tuple[int, int], mpp: float, seed: int, truth: Path | None) -> None:
    """Make a synthetic H&E colon slide with known truth.

    OUT is a pyramidal JPEG TIFF with its resolution, which any viewer opens.
    """
    from tqdm import tqdm

    from wsiseg.errors import UsageError
    from wsiseg.geometry import Size
    from wsiseg.slides.phantom import write_phantom

    for path in (out, truth):
        if path is not None and path.suffix.lower() not in (".tif", ".tiff"):
            raise UsageError(f"{path}: a TIFF is written; give it a name that ends in .tif")
    with tqdm(unit="row", disable=None, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        write_phantom(out, Size(*size), mpp=mpp, seed=seed, truth=truth, progress=show)
    click.echo(f"{out}: {size[0]} x {size[1]} px at {mpp:g} um per pixel")
    if truth is not None:
        click.echo(f"{truth}: its truth (0 glass, 1 stroma, 2 gland)")
