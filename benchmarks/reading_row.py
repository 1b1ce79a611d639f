"""The speeds of reading.py beside their targets.

    python benchmarks/reading_row.py --slide slide.svs

All readers must give the same pixels. Judged is the reader "direct", on windows that begin where a
chunk does: its share of the decode limit on one thread, and what a second thread gains.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
from reading import READERS, Speed, measure
from shared import run
from timing import Row, open_row, row_options

from wsiseg.errors import WsisegError
from wsiseg.geometry import Size
from wsiseg.slides.phantom import write_phantom

JUDGED = "direct"
MIN_SHARE, MIN_GAIN = 0.8, 1.8


def judge(row: Row, speeds: list[Speed]) -> None:
    """Set speeds beside their targets."""
    value = {(s.reader, s.aligned, s.threads): s.mpx_per_s for s in speeds}
    share = value[JUDGED, True, 1] / value["decode limit", True, 1]
    row.judge("share of the decode limit, aligned", share, ">=", MIN_SHARE)
    gain = value[JUDGED, True, 2] / value[JUDGED, True, 1]
    row.judge("gain of a second thread, aligned", gain, ">=", MIN_GAIN)
    for (reader, aligned, threads), speed in value.items():
        where = "aligned" if aligned else "off-grid"
        row.note(**{f"{reader}, {where}, {threads} threads, Mpx/s": speed})


@click.command(help=__doc__.splitlines()[0])
@row_options
@click.option("--slide", type=click.Path(path_type=Path), help="JPEG SVS or TIFF; else a phantom.")
@click.option("--side", default=6144, show_default=True, help="Side of the phantom in pixels.")
@click.option("--windows", default=49, show_default=True, help="Windows at most.")
@click.option("--window", default=768, show_default=True, help="Side of a window in pixels.")
@click.option("--repeats", default=3, show_default=True, help="The best of these counts.")
def main(**words: Any) -> None:
    """Measure and judge."""
    row = open_row("reading", words)
    sizes = {"window_px": words["window"], "count": words["windows"], "repeats": words["repeats"]}
    equal = f"pixels of {', '.join(READERS)}"
    with tempfile.TemporaryDirectory() as folder:
        path = words["slide"] or Path(folder) / "phantom.tif"
        if words["slide"] is None:
            write_phantom(path, Size(words["side"], words["side"]), seed=1)
        try:
            speeds = measure(path, threads=(1, 2), **sizes)
        except WsisegError as e:
            if type(e) is not WsisegError:  # the slide cannot be read, or another mistake
                raise
            row.equal(f"{equal} ({e})", False)
            return
    row.equal(equal, True)
    judge(row, speeds)
    row.finish()


if __name__ == "__main__":
    run(main)
