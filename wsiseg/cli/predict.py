"""`wsiseg predict`: slides to masks, polygons and overviews. Knows no pixels."""

from __future__ import annotations

from typing import Any

import click

from wsiseg.cli.say import PATH


@click.command("predict")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--out", type=PATH, required=True, help="Folder for the outputs; made if missing.")
@click.option(
    "--model", default="glas-small", show_default=True, help="Name in the zoo, or .safetensors."
)
@click.option(
    "--mpp", type=float, help="Micrometres per pixel of all slides, over what they or a table say."
)
@click.option(
    "--overlap",
    type=int,
    help="Pixels that windows have in common; default a third of a window. On slides it may be "
    "another window than the checkpoint's; --dry-run says it.",
)
@click.option("--batch-size", type=int, help="Tiles encoded at a time.")
@click.option("--workers", type=int, help="Threads that read the slide.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, mps.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
)
@click.option(
    "--runtime",
    type=click.Choice(["torch", "openvino"]),
    default="torch",
    show_default=True,
    help="What runs the networks; openvino, for CPUs, is an extra to install.",
)
@click.option("--tissue", help="auto (default), none, or a mask image, white where to look.")
@click.option(
    "--coords",
    type=click.Choice(["qupath", "openslide"]),
    default="qupath",
    show_default=True,
    help="Origin of slides that state their bounds: cropped to them, or not.",
)
@click.option(
    "--min-area", type=float, help="Smallest polygon and hole, in square micrometres; default 50."
)
@click.option(
    "--tolerance", type=float, help="Simplification of polygons, in micrometres; default 1."
)
@click.option("--all-classes", is_flag=True, help="Polygons of the background class too.")
@click.option("--gzip", is_flag=True, help="Write .geojson.gz.")
@click.option(
    "--overwrite", is_flag=True, help="Make outputs that are there again, whoever wrote them."
)
@click.option("--keep-canvas", is_flag=True, help="Keep STEM.canvas for `wsiseg export`.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and what it would cost.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise, if any.")
@click.option("--tta", is_flag=True, help="Average over flips and quarter turns: 8 times the work.")
@click.option(
    "--memory",
    type=float,
    default=1.0,
    show_default=True,
    help="GiB for what windows share; on CUDA devices 3/8 of their memory instead.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "openslide", "direct", "tiffslide"]),
    default="auto",
    show_default=True,
    help="Library that reads the slides.",
)
@click.option("--gpus", help="GPUs to work on at the same time, as 0,1: a process each.")
@click.option("--processes", type=int, help="Slides done at the same time, each by a process.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="What shares out the slides: this machine, or Ray, an extra to install.",
)
@click.option(
    "--address", help="Ray cluster to join, as HOST:PORT or auto; else one is begun here."
)
@click.option("--gpu-share", type=float, help="Part of a GPU that a slide takes, for Ray.")
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Segment slides and write STEM.mask.ome.tif, STEM.geojson, STEM.json and STEM.overview.png.

    INPUT is a slide, a folder of slides (not those in folders below it), a quoted pattern, a .txt
    list (a path a line) or a .csv table (path[,mpp][,tissue]). Complete outputs are skipped. The
    exit code is 1 if some slide failed (the others are done), 2 if the request cannot be.
    """
    from wsiseg.cli.predict_run import predict
    from wsiseg.cli.predict_settings import Settings

    context.exit(predict(Settings(**options)))
