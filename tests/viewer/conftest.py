"""A run of two slides, one with an odd name, with known labels."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import tifffile
from viewer_run import CLASSES, ODD, SIZE, Run

from wsiseg.canvas import Canvas
from wsiseg.outputs.files import write_outputs
from wsiseg.slides import open_slide
from wsiseg.slides.phantom import write_phantom
from wsiseg.viewer.server import Server, Site


@pytest.fixture(scope="session")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    top = tmp_path_factory.mktemp("run")
    out, slides = top / "out", top / "elsewhere" / "below"
    slides.mkdir(parents=True)
    labels = np.zeros((1, 1), np.uint8)
    for seed, stem in enumerate(("a", ODD)):
        write_phantom(slides / f"{stem}.tif", SIZE, seed=seed, truth=top / "truth.tif")
        with open_slide(slides / f"{stem}.tif") as slide:
            grid = slide.grid(1.0)
            own = tifffile.imread(top / "truth.tif", key=0)[::2, ::2]
            labels = own if stem == "a" else labels
            record = {
                "status": "ok",
                "slide": {
                    "path": slide.path.name,
                    "quickhash": slide.quickhash,
                    "mpp": slide.mpp,
                    "backend": slide.backend,
                    "frame": slide.frame,
                    "size": list(slide.size),
                },
                "model": {"name": "tiny", "sha256": "ab" * 32, "licence": "CC0-1.0"},
                "parameters": {"tissue": "auto"},
                "timings": {"total": 12.5},
            }
            canvas = Canvas.create(
                top / f"{seed}.canvas", grid=grid, classes=CLASSES, record=record, chunk_px=512
            )
            canvas.set_image("thumbnail", slide.thumbnail(400))
            for row, column in canvas.chunks():
                part = own[canvas.chunk_box(row, column).slices]
                canvas.write_chunk(row, column, part, np.full_like(part, 200))
            write_outputs(canvas, out, stem)
    return Run(out, slides.parent, labels)


@pytest.fixture
def server(made_run: Run) -> Iterator[Server]:
    served = Server(Site(made_run.out, (made_run.slides,)))
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()
