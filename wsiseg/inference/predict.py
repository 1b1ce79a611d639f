"""One slide through a segmenter into a canvas. Knows no slide formats and no output files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wsiseg.canvas import Canvas
from wsiseg.errors import LeaseLostError
from wsiseg.inference.blend import Blender
from wsiseg.inference.contracts import Progress, SlideLike, TissueLike
from wsiseg.inference.engine import Stopwatch, WindowFeatures
from wsiseg.inference.features import groups
from wsiseg.inference.job import Job, PredictOptions, prepare
from wsiseg.inference.memory import memory_said
from wsiseg.inference.normalise import stain_parameters
from wsiseg.inference.objects import make_objects, wants_objects
from wsiseg.inference.reader import TileReader
from wsiseg.inference.record import slide_record, timings, versions
from wsiseg.inference.resume import (
    check_target,
    identity,
    origin,
    plan_left,
    schedule_left,
    take_up,
    windows_left,
)
from wsiseg.inference.slide_windows import for_slides
from wsiseg.models.segmenter import Segmenter

THUMBNAIL_PX = 1600
CHUNK_PX = 512


@dataclass(frozen=True, eq=False)
class Work:
    """A slide that is ready to be worked through.

    Attributes:
        slide: the open slide.
        job: what is left to do.
        canvas: its canvas.
        pictures: thumbnail and tissue, for the canvas.
        tissue: where to look.
        note: in one line, that an interrupted run is continued, or why not; else empty.
        continued: chunks that were done already.
        keep: whether the canvas is left for another run where this one is interrupted.
        watch: the clock, which runs.
        check: raises LeaseLostError where the canvas is another process's by now.
    """

    slide: SlideLike
    job: Job
    canvas: Canvas
    pictures: dict[str, npt.NDArray[np.uint8]]
    tissue: TissueLike | None
    note: str
    continued: int
    keep: bool
    watch: Stopwatch
    check: Callable[[], None]


def predict_slide(
    slide: SlideLike,
    segmenter: Segmenter,
    canvas_path: str | Path,
    *,
    options: PredictOptions | None = None,
    tissue: TissueLike | None = None,
    progress: Progress | None = None,
) -> Canvas:
    """Segment a slide.

    Args:
        slide: an open slide.
        segmenter: the model; it runs where its weights are and is left in evaluation mode.
        canvas_path: folder for the canvas; an older canvas there is replaced, or continued where
            the options say so.
        options: how to work; the defaults suit most slides.
        tissue: where to look, from `find_tissue(slide)`; None analyses the whole slide, glass
            included. Pixels outside are 0 in the canvas.
        progress: called with (tiles encoded, tiles in all) after every batch.

    Returns:
        The complete canvas. `canvas.record["status"]` is "ok", or "no tissue" where the mask left
        nothing to analyse and every label is 0. Its record holds `slide`, `model`, `parameters`,
        `versions`, `status` and `timings`. The timings are seconds the loop spent in "read"
        (waiting for the reader threads), "encode", "head" and "blend". A CUDA device works beside
        the loop: there "encode" and "head" are the handing over of work and what the loop waits
        meanwhile (in "head" for windows some groups back), not what the device takes for either.
        Where the model asks for post-processing, "objects" is that of `make_objects`.

    Raises:
        UsageError: an option that cannot be.
        SlideError: the slide cannot be read.
        DeviceMemoryError: the device has no memory for even one tile or window.
        ModelError: the model gave values that are no numbers.
        CanvasError: the canvas cannot be written, or `canvas_path` is something else.
        OutputError: with `options.resume`, it is the canvas of a slide that lies elsewhere.

    On any error the canvas is removed. With `options.resume` it is left, where anything of it is
    done.
    """
    options = options or PredictOptions()
    work = begin(slide, segmenter, canvas_path, options=options, tissue=tissue)
    return carry_out(work, progress)


def begin(
    slide: SlideLike,
    segmenter: Segmenter,
    canvas_path: str | Path,
    *,
    options: PredictOptions,
    tissue: TissueLike | None = None,
    check: Callable[[], None] = lambda: None,
) -> Work:
    """Settle what is to be done and make or take up the canvas; see `predict_slide`.

    `check` is called before a canvas is touched, before objects and the last record are written,
    and before it is removed after an error; where it raises LeaseLostError the canvas is another
    process's, and stays.
    """
    segmenter = for_slides(segmenter.eval())
    watch, info, path = Stopwatch(), segmenter.info, Path(canvas_path)
    grid = slide.grid(info.mpp)
    job = prepare(grid, segmenter, options=options, tissue=tissue)
    check_target(path)
    thumbnail = np.asarray(slide.thumbnail(THUMBNAIL_PX), np.uint8)
    with watch("read"):
        stain = stain_parameters(slide, info, grid, thumbnail=thumbnail, tissue=tissue)
    record = _record(slide, job, options=options, tissue=tissue)
    record["parameters"].update(stain)
    record["identity"] = origin(slide) | identity(
        record,
        layout=job.layout,
        classes=info.classes,
        chunk_px=CHUNK_PX,
        tissue=tissue,
        batches=job.loads if job.engine.batches else None,
    )
    check()
    canvas, done, note = take_up(path, record["identity"]) if options.resume else (None, 0, "")
    check()
    if canvas is None:
        canvas = Canvas.create(
            path,
            grid=grid,
            classes=info.classes,
            record=record,
            chunk_px=CHUNK_PX,
            border=info.border,
        )
    else:
        canvas.replace_record(record)
    if done:
        chunks = len(job.layout.windows_per_chunk(CHUNK_PX))
        note = ", ".join([f"continuing: {done} of {chunks} chunks were done", *note.splitlines()])
        job = _left(job, canvas)
    mask = np.ones((1, 1), np.uint8) if tissue is None else np.asarray(tissue.mask, np.uint8)
    pictures = {"thumbnail": thumbnail, "tissue": mask}
    return Work(slide, job, canvas, pictures, tissue, note, done, options.resume, watch, check)


def carry_out(work: Work, progress: Progress | None = None) -> Canvas:
    """Do what `begin` settled; see `predict_slide`."""
    canvas, job, info = work.canvas, work.job, work.job.engine.segmenter.info
    if job.engine.device.type == "cuda":
        torch.cuda.set_device(job.engine.device)  # of this thread, which may not have begun it
    try:
        canvas.restore_labels()
        for name, picture in work.pictures.items():
            canvas.set_image(name, picture)
        blender = Blender(
            job.layout,
            len(info.classes),
            canvas,
            tissue=work.tissue,
            memory_bytes=job.blend_bytes,
            device=job.engine.device,
        )
        try:
            with memory_said(job.engine.device):
                _segment(work, blender, progress or (lambda done, total: None))
        finally:
            blender.close()
        if wants_objects(info):
            with work.watch("objects"):
                make_objects(canvas, info.objects, check=work.check)
        work.check()
        canvas.update_record(
            status="ok" if canvas.done_count else "no tissue",
            chunks=canvas.done_count,
            timings=timings(
                work.watch,
                loads=job.loads,
                windows=len(job.layout.windows),
                spilled=blender.spilled,
                continued=work.continued,
                most=job.engine.parts.most,
            ),
        )
    except BaseException:
        if not work.keep or not canvas.done_count:
            with suppress(LeaseLostError):  # the canvas is another process's
                work.check()
                canvas.remove()
        raise
    return canvas


def _left(job: Job, canvas: Canvas) -> Job:
    """The part of a job that a canvas lacks."""
    windows = windows_left(job.layout, canvas, group=job.group)
    batch = job.batch_size if job.engine.batches else 1
    loads = None if job.loads is None else schedule_left(job.loads, windows, batch=batch)
    return replace(job, layout=plan_left(job.layout, windows), loads=loads)


def _segment(work: Work, blender: Blender, progress: Progress) -> None:
    """The loop: read, encode, classify, blend."""
    job, watch = work.job, work.watch
    if job.loads is None:
        blender.finish()
        return
    layout, engine = job.layout, job.engine
    features = WindowFeatures(engine, layout, job.loads, batch_size=job.batch_size, group=job.group)
    reader = TileReader(
        work.slide,
        layout.grid,
        tile_px=layout.tile_px,
        workers=job.workers,
        ahead=2 * job.batch_size + job.workers,
        stain_matrix=work.canvas.record["parameters"].get("stain_matrix"),
    )
    progress(0, features.count)
    with reader:
        tiles = reader.tiles(layout.tile_place(int(tile)) for tile in job.loads.tiles)
        for start, stop in groups(len(layout.windows), job.group):
            for encoded in features.take(start, stop, tiles, watch):
                progress(encoded, features.count)
            places = layout.places(start, stop)
            with watch("head"):
                probabilities = engine.classify(features.windows(start, stop), places)
            with watch("blend"):
                blender.add(probabilities, places)
        with watch("head"):
            engine.settle()
    with watch("blend"):
        blender.finish()


def _record(
    slide: SlideLike, job: Job, *, options: PredictOptions, tissue: TissueLike | None
) -> dict[str, Any]:
    info, settings = job.engine.segmenter.info, asdict(options)
    del settings["resume"]
    return {
        "slide": slide_record(slide),
        "model": {"name": info.name, "sha256": info.sha256, "licence": info.licence},
        "parameters": {
            **settings,
            "overlap_px": job.layout.overlap_px,
            "batch_size": job.batch_size,
            "workers": job.workers,
            "precision": job.engine.precision,
            "device": str(job.engine.device),
            **({} if job.engine.runtime == "torch" else {"runtime": job.engine.runtime}),
            "mpp": info.mpp,
            "window_px": info.window_px,
            "tile_px": info.tile_px,
            "tissue": "none" if tissue is None else "mask",
            **({"objects": asdict(info.objects)} if wants_objects(info) else {}),
        },
        "versions": versions(job.engine.runtime),
    }
