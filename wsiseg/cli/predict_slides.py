"""What `wsiseg predict` does with one slide: glues slide, tissue, inference, outputs and lock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from wsiseg.canvas import Canvas
from wsiseg.canvas_store import discard
from wsiseg.cli.predict_known import Series, Stamp, complete, file_stamp, stamp, unlike
from wsiseg.cli.predict_settings import Settings
from wsiseg.cli.predict_warnings import warn_of_slide, warn_of_stain
from wsiseg.cli.progress import Progress, format_seconds
from wsiseg.cli.say import say
from wsiseg.cli.summary import summary
from wsiseg.errors import CanvasError, OutputError, SlideError
from wsiseg.inference.cohort import ELSEWHERE, Outcome, Task
from wsiseg.inference.estimate import Speed, estimate, measure_speed
from wsiseg.inference.job import PredictOptions, prepare
from wsiseg.inference.objects import wants_objects
from wsiseg.inference.predict import begin, carry_out
from wsiseg.lease import Lease, Locks
from wsiseg.models.segmenter import Segmenter
from wsiseg.outputs.files import refuse_foreign, write_outputs
from wsiseg.outputs.tracing import Tracing
from wsiseg.slides.slide import Slide
from wsiseg.slides.tissue import TissueMask, find_tissue


class Reporter(Protocol):
    """Shows the progress of one slide."""

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` units are done."""

    def close(self) -> None:
        """Show no more."""


@dataclass
class Slides:
    """The command at work on one slide after the other.

    Attributes:
        settings: of the command.
        segmenter: its model.
        options: of inference.
        locks: those that are held and watched.
        stamps: see the function of that name.
        progress: makes what shows the progress of a slide, from its stem.
        series: DICOM slides that were met.
    """

    settings: Settings
    segmenter: Segmenter
    options: PredictOptions
    locks: Locks
    stamps: dict[str, Stamp | None] = field(default_factory=dict)
    progress: Callable[[str], Reporter] = Progress
    series: Series = field(default_factory=Series)
    _speed: Speed | None = None

    def work(self, task: Task, *, patient: bool) -> Outcome | None:
        """Segment one slide and write its outputs, unless they are there.

        Args:
            task: the slide.
            patient: whether to wait until it is known if another process that has it still lives.

        Returns:
            What became of it; None for another file of a slide that is done.
        """
        began, file = time.monotonic(), file_stamp(task.path)
        lock = self.settings.out / f"{task.stem}.lock"
        with ExitStack() as held:
            with self.settings.open(task) as slide:
                if self.series.is_known(slide, task):
                    return None
                lease = self._lock(lock, slide, patient=patient)
                if lease is not None:
                    held.enter_context(lease)
                if (done := self._done(slide, task)) is not None:
                    if lease is not None:
                        self._tidy(task)
                    return done
                if lease is None:
                    return self._elsewhere(task, lock, slide, patient=patient)
                if not self.settings.overwrite:
                    refuse_foreign(self.settings.out, task.stem)
                warn_of_slide(slide, task.path, self.segmenter.info)
                tracing = held.enter_context(Tracing())
                tissue = self.settings.tissue_record(task)  # now, as it may be edited meanwhile
                canvas = self._canvas_of_one(slide, task, lease, file, tracing)
            return self._outputs(canvas, task, lease, began, tracing, tissue)

    def dry(self, task: Task) -> None:
        """Say what would be done with one slide."""
        with self.settings.open(task) as slide:
            if self.series.is_known(slide, task):
                return
            warn_of_slide(slide, task.path, self.segmenter.info)
            grid = slide.grid(self.segmenter.info.mpp)
            tissue = self._tissue(slide, task)
            job = prepare(grid, self.segmenter, options=self.options, tissue=tissue)
            self._speed = self._speed or measure_speed(job.engine)
            cost = estimate(job, self._speed)
            level = slide.best_level(grid)
            downsample = slide.level_downsamples[level]
            there = None
            if not self.settings.overwrite:
                there = complete(self.settings, self.segmenter.info, slide, task)
        area = "whole slide" if tissue is None else f"{100 * tissue.fraction:.1f}% of the slide"
        again = f", {cost.recomputed} of them again for lack of --memory" * bool(cost.recomputed)
        rows = [
            ("size", f"{slide.size.width} x {slide.size.height} px at {slide.mpp:.4g} um/px"),
            ("mpp from", slide.mpp_source),
            ("level read", f"{level} (downsample {downsample:.4g})"),
            ("grid", f"{grid.size.width} x {grid.size.height} px at {grid.mpp:.4g} um/px"),
            ("tissue", f"{area} ({self.settings.tissue_of(task)})"),
            ("windows", f"{cost.windows} of {job.layout.window_px} px"),
            ("tiles", f"{cost.tiles} ({cost.tiles_without_sharing} without sharing){again}"),
            ("memory", f"about {cost.memory_gib:.2f} GiB beside the libraries"),
            ("time", f"about {format_seconds(cost.seconds)} of the model, measured just now"),
        ]
        if there is not None:
            rows.append(("skipped", "its outputs are complete (--overwrite makes them again)"))
        say(f"{task.path}")
        for name, text in rows:
            say(f"  {name:<11} {text}")

    def _lock(self, path: Path, slide: Slide, *, patient: bool) -> Lease | None:
        """The lock of a slide, which says what slide it is, if it is to be had.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            return (self.locks.settle if patient else self.locks.take)(path, slide.quickhash)
        except OSError as e:
            raise OutputError(
                f"{path}: cannot write ({e.strerror or e}); check free space and permissions, then"
                " start the same command again"
            ) from e

    def _elsewhere(self, task: Task, lock: Path, slide: Slide, *, patient: bool) -> Outcome:
        """That another process has the slide.

        Raises:
            OutputError: it lives, and what it has is another slide of that name.
        """
        who, matter = self.locks.holder(lock)
        if patient and matter not in ("", slide.quickhash):
            raise OutputError(
                f"{lock}: {who} is at work on another slide of that name; choose another --out"
            )
        return Outcome(task, ELSEWHERE, error=who)

    def _canvas_of_one(
        self,
        slide: Slide,
        task: Task,
        lease: Lease,
        file: tuple[int, ...] | None,
        tracing: Tracing,
    ) -> Canvas:
        """The complete canvas of a slide whose file, as it was before, still holds that slide.

        Raises:
            SlideError: it holds another one by now, and the canvas, which may be of both, is gone.
        """
        failure, canvas = None, None
        try:
            canvas = self._canvas(slide, task, lease, tracing)
        except SlideError as e:
            failure = e
        try:
            same = file_stamp(task.path) in (file, None) or self._is_of(slide, task)
        except SlideError as e:
            raise failure or e from e
        if not same:
            lease.check()
            discard(self._canvas_path(task))
            raise SlideError(
                f"{task.path}: was replaced by another slide while it was read; start the same"
                " command again when it is complete"
            )
        if failure is not None:
            raise failure
        assert canvas is not None
        return canvas

    def _is_of(self, slide: Slide, task: Task) -> bool:
        """Whether the file of a task holds a slide that was opened before."""
        with self.settings.open(task) as now:
            return (now.quickhash, now.size) == (slide.quickhash, slide.size)

    def _canvas(self, slide: Slide, task: Task, lease: Lease, tracing: Tracing) -> Canvas:
        """The complete canvas of a slide, continued where an interrupted run left one.

        Where its labels stay as the model gives them, regions are traced meanwhile.
        """
        tissue = self._tissue(slide, task)
        progress = self.progress(task.stem)

        def report(done: int, total: int) -> None:
            lease.check()
            progress(done, total)

        try:
            work = begin(
                slide,
                self.segmenter,
                self._canvas_path(task),
                options=self.options,
                tissue=tissue,
                check=lease.check,
            )
            if work.note:
                say(f"{task.stem}: {work.note}")
            options = self.settings.output_options()
            if "geojson" in options.kinds and not wants_objects(self.segmenter.info):
                chunks = work.job.layout.windows_per_chunk(work.canvas.chunk_px)
                tracing.follow(work.canvas, options.polygons, chunks)
            return carry_out(work, report)
        finally:
            progress.close()

    def _outputs(
        self,
        canvas: Canvas,
        task: Task,
        lease: Lease,
        began: float,
        tracing: Tracing,
        tissue: Mapping[str, str | None],
    ) -> Outcome:
        """Write the outputs of a complete canvas; it is left there where they cannot be."""
        settings = self.settings
        lease.check()
        parameters = {**canvas.record["parameters"], **tissue}
        canvas.update_record(parameters=parameters, kept=settings.keep_canvas)
        warn_of_stain(canvas, task.path)
        if not settings.overwrite:  # may have come meanwhile
            refuse_foreign(settings.out, task.stem)
        try:
            written = write_outputs(
                canvas,
                settings.out,
                task.stem,
                settings.output_options(),
                check=lease.check,
                regions=tracing.regions,
            )
        except OutputError:
            lease.check()  # who has the slide by now removes what this process left unfinished
            raise
        if not settings.keep_canvas:
            lease.check()
            canvas.remove()
        seconds = time.monotonic() - began
        say(summary(canvas, written, seconds=seconds))
        if settings.keep_canvas:
            say(f"  kept {canvas.path}")
        areas = {area.name: area.mm2 for area in written.areas}
        return Outcome(task, str(canvas.record["status"]), seconds, areas)

    def _done(self, slide: Slide, task: Task) -> Outcome | None:
        """What complete outputs of this slide and model say, if they are there and may stay."""
        if self.settings.overwrite and stamp(self.settings.out, task) == self.stamps[task.stem]:
            return None
        sidecar = complete(self.settings, self.segmenter.info, slide, task)
        if sidecar is None:
            return None
        again = "" if self.settings.overwrite else " (--overwrite makes them again)"
        noted = unlike(self.settings, sidecar, self._canvas_path(task))
        say(f"{task.stem}: outputs are complete, skipped{again}{noted}")
        seconds, areas = sidecar.get("timings", {}).get("total"), sidecar.get("areas_mm2", {})
        return Outcome(task, str(sidecar.get("status")), seconds, areas, earlier=True)

    def _canvas_path(self, task: Task) -> Path:
        return self.settings.out / f"{task.stem}.canvas"

    def _tidy(self, task: Task) -> None:
        """Remove a canvas that a run left which was killed just before it would have."""
        path = self._canvas_path(task)
        try:
            record = Canvas.open(path).record if path.exists() else {"kept": False}
        except CanvasError:
            return
        asked_for = self.settings.keep_canvas or record.get("kept", "identity" not in record)
        if not asked_for:
            discard(path)

    def _tissue(self, slide: Slide, task: Task) -> TissueMask | None:
        mode = self.settings.tissue_of(task)
        return None if mode == "none" else find_tissue(slide, mode)
