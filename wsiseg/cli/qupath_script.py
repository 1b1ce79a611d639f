"""`wsiseg qupath-script`: print the script that imports polygons into QuPath."""

from __future__ import annotations

from pathlib import Path

import click

from wsiseg.cli.say import UserPath


@click.command("qupath-script")
@click.option(
    "--out",
    type=UserPath(dir_okay=False),
    help="Write the script to a file instead.",
)
def command(out: Path | None) -> None:
    """Print a Groovy script that imports the polygons into QuPath.

    Run it in QuPath (Automate > Script editor) with a project open: it asks for the folder of the
    results and imports slide.geojson for every slide of the project. QuPath 0.4 or newer.
    """
    from wsiseg.outputs.qupath import qupath_script, write_qupath_script

    if out is None:
        click.echo(qupath_script(), nl=False)
    else:
        write_qupath_script(out)
        click.echo(f"wrote {out}", err=True)
