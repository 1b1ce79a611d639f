"""`wsiseg view`: slides with their masks in a browser. Knows no HTTP."""

from __future__ import annotations

from pathlib import Path

import click

from wsiseg.cli.say import PATH


@click.command("view")
@click.argument("folder", metavar="OUT", type=PATH)
@click.option(
    "--slides",
    multiple=True,
    metavar="DIR",
    type=PATH,
    help="Folder of the slides, with those below it; may be given more than once.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port to listen on; a free one if not given.",
)
@click.option("--open/--no-open", "browser", default=False, help="Open the page in the browser.")
def command(folder: Path, slides: tuple[Path, ...], port: int, browser: bool) -> None:
    """Show the outputs in OUT in a browser on this machine, masks over their slides.

    Slides are also looked for in OUT and in the folder above it. Only this machine can reach the
    page, and only with the whole address that is printed. Ctrl-C ends it.
    """
    from wsiseg.viewer.server import Server, Site

    server = Server(Site(folder, slides), port)
    try:
        count = len(server.site.results)
        click.echo(server.url)
        click.echo(f"serving {count} slide{'s' * (count > 1)}; Ctrl-C ends it")
        if browser:
            click.launch(server.url)
        server.serve_forever(poll_interval=0.2)
    finally:
        server.server_close()
