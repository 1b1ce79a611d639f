"""`wsiseg report`: the page of a run. Knows no HTML."""

from __future__ import annotations

from pathlib import Path

import click

from wsiseg.cli.say import PATH


@click.command("report")
@click.argument("folder", metavar="OUT", type=PATH)
@click.option("--html", type=PATH, help="File to write; OUT/report.html if not given.")
def command(folder: Path, html: Path | None) -> None:
    """Write one HTML page for the outputs in OUT: a row a slide with areas, totals, failures.

    The page holds everything it shows and needs no network. To look at the slides themselves, see
    `wsiseg view`.
    """
    from tqdm import tqdm

    from wsiseg.outputs.run_folder import read_run
    from wsiseg.viewer.report import write_report

    path = folder / "report.html" if html is None else html
    results = read_run(folder)
    with tqdm(total=len(results), unit="slide", disable=None, leave=False) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        bad = write_report(path, folder, results, progress=show)
    note = f", {bad} without a usable result" if bad else ""
    click.echo(f"{path}: {len(results)} slide{'s' * (len(results) > 1)}{note}")
