"""What `wsiseg predict` does: glues slides, tissue, inference and outputs. Knows no algorithm."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from wsiseg.canvas import Canvas
from wsiseg.cli.progress import Progress, format_seconds
from wsiseg.cli.summary import summary
from wsiseg.errors import ModelError, OutputError, UsageError
from wsiseg.geometry import Grid, Size
from wsiseg.inference.cohort import Failure, Task, collect, run_tasks
from wsiseg.inference.estimate import Speed, estimate, measure_speed
from wsiseg.inference.predict import PredictOptions, predict_slide, prepare
from wsiseg.models.checkpoint import load_model
from wsiseg.models.devices import pick_device
from wsiseg.models.segmenter import Segmenter
from wsiseg.outputs.files import OutputOptions, complete_outputs, write_outputs
from wsiseg.outputs.geojson import PolygonOptions
from wsiseg.slides.slide import Slide, open_slide
from wsiseg.slides.tissue import TissueMask, find_tissue

SCANNER_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".dcm", ".vms", ".vmu", ".svslide")
IMAGE_SUFFIXES = (".tif", ".tiff", ".btf", ".png", ".jpg", ".jpeg")
COARSE = 1.5
"""Slides whose mpp is over this many times the model's lack what the model looks at."""


@dataclass(frozen=True)
class Settings:
    """The options of the command, named as there."""

    inputs: tuple[str, ...]
    out: Path
    model: str
    mpp: float | None
    overlap: int
    batch_size: int | None
    workers: int | None
    device: str
    precision: str
    tissue: str | None
    coords: str
    min_area: float | None
    tolerance: float | None
    all_classes: bool
    gzip: bool
    overwrite: bool
    keep_canvas: bool
    dry_run: bool
    seed: int
    tta: bool
    memory: float
    backend: Any

    def predict_options(self) -> PredictOptions:
        """The part that inference takes."""
        return PredictOptions(
            overlap_px=self.overlap,
            batch_size=self.batch_size,
            workers=self.workers,
            memory_gib=self.memory,
            precision=self.precision,
            seed=self.seed,
            tta=self.tta,
        )

    def output_options(self) -> OutputOptions:
        """The part that the outputs take; what was not given keeps its default."""
        given = {"min_area_um2": self.min_area, "tolerance_um": self.tolerance}
        chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        polygons = PolygonOptions(all_classes=self.all_classes, gzip=self.gzip, **chosen)
        return OutputOptions(polygons=polygons)

    def tissue_of(self, task: Task) -> str:
        """Tissue mode or mask file for a slide: the option, then the table, then auto."""
        return self.tissue or task.tissue or "auto"

    def open(self, task: Task) -> Slide:
        """The slide of a task."""
        mpp = self.mpp if self.mpp is not None else task.mpp
        crop = self.coords == "qupath"
        return open_slide(task.path, backend=self.backend, mpp=mpp, crop_to_bounds=crop)


def predict(settings: Settings) -> int:
    """Do what the command was asked; returns its exit code, 0 or 1.

    Raises:
        UsageError: the request cannot be; nothing was done.
        WsisegError: the model or the output folder cannot be used; nothing was done.
    """
    tasks = collect(settings.inputs, suffixes={*SCANNER_SUFFIXES, *IMAGE_SUFFIXES})
    options = settings.predict_options()
    if settings.tissue not in (None, "auto", "none") and not Path(settings.tissue).is_file():
        raise UsageError(f"--tissue {settings.tissue}: no such mask file; or give auto or none")
    settings.output_options()
    if settings.mpp is not None and not 0.01 <= settings.mpp <= 1000:
        raise UsageError(f"--mpp {settings.mpp}: must be from 0.01 to 1000 um per pixel")
    if not settings.dry_run:
        _check_folder(settings.out)
    segmenter = _load(settings)
    prepare(Grid.at_mpp(Size(1, 1), 1.0, 1.0), segmenter, options=options)
    run = _Run(settings, segmenter, options)
    failures = []
    for result in run_tasks(tasks, run.dry if settings.dry_run else run.slide):
        if result is not None:
            click.echo(f"wsiseg: error: {result.reason}", err=True)
            failures.append(result)
    _sum_up(tasks, failures)
    return 1 if failures else 0


def _load(settings: Settings) -> Segmenter:
    try:
        pick_device(settings.device)
    except ModelError as e:
        raise UsageError(str(e)) from e
    return load_model(settings.model, device=settings.device)


def _check_folder(folder: Path) -> None:
    """Make the folder and write to it, so that hours of work do not end at a closed door."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise OutputError(
            f"--out {folder}: cannot write there ({e.strerror or e}); choose another folder"
        ) from e


def _sum_up(tasks: list[Task], failures: list[Failure]) -> None:
    if len(tasks) < 2 or not failures:
        return
    click.echo(f"{len(failures)} of {len(tasks)} slides failed:", err=True)
    for failure in failures:
        click.echo(f"  {failure.task.path}", err=True)


@dataclass
class _Run:
    """The command at work on one slide after the other."""

    settings: Settings
    segmenter: Segmenter
    options: PredictOptions
    _series: dict[str, Path] = field(default_factory=dict)
    _speed: Speed | None = None

    def slide(self, task: Task) -> None:
        """Segment one slide and write its outputs."""
        settings, out = self.settings, self.settings.out
        with settings.open(task) as slide:
            if self._is_known(slide, task):
                return
            if not settings.overwrite and self._is_done(slide, task):
                click.echo(
                    f"{task.stem}: outputs are complete, skipped (--overwrite makes them again)"
                )
                return
            self._warn(slide, task)
            began = time.perf_counter()
            canvas = self._canvas(slide, task)
        try:
            self._note_tissue(canvas, task)
            self._warn_stain(canvas, task)
            written = write_outputs(canvas, out, task.stem, settings.output_options())
        finally:
            if not settings.keep_canvas:
                canvas.remove()
        click.echo(summary(canvas, written, seconds=time.perf_counter() - began))
        if settings.keep_canvas:
            click.echo(f"  kept {canvas.path}")

    def dry(self, task: Task) -> None:
        """Say what would be done with one slide."""
        with self.settings.open(task) as slide:
            if self._is_known(slide, task):
                return
            self._warn(slide, task)
            grid = slide.grid(self.segmenter.info.mpp)
            tissue = self._tissue(slide, task)
            job = prepare(grid, self.segmenter, options=self.options, tissue=tissue)
            self._speed = self._speed or measure_speed(job.engine)
            cost = estimate(job, self._speed)
            level = slide.best_level(grid)
            downsample = slide.level_downsamples[level]
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
        click.echo(f"{task.path}")
        for name, text in rows:
            click.echo(f"  {name:<11} {text}")

    def _canvas(self, slide: Slide, task: Task) -> Canvas:
        tissue = self._tissue(slide, task)
        progress = Progress(task.stem)
        try:
            canvas = predict_slide(
                slide,
                self.segmenter,
                self.settings.out / f"{task.stem}.canvas",
                options=self.options,
                tissue=tissue,
                progress=progress,
            )
        finally:
            progress.close()
        return canvas

    def _note_tissue(self, canvas: Canvas, task: Task) -> None:
        """Record the tissue mode, or the name of the mask file."""
        mode = self.settings.tissue_of(task)
        mode = mode if mode in ("auto", "none") else Path(mode).name
        canvas.update_record(parameters={**canvas.record["parameters"], "tissue": mode})

    def _tissue(self, slide: Slide, task: Task) -> TissueMask | None:
        mode = self.settings.tissue_of(task)
        return None if mode == "none" else find_tissue(slide, mode)

    def _is_done(self, slide: Slide, task: Task) -> bool:
        """Whether complete outputs of this slide and model are there.

        Raises:
            OutputError: they are of another slide, resolution or model.
        """
        sidecar = complete_outputs(self.settings.out, task.stem)
        if sidecar is None:
            return False
        own: dict[str, dict[str, Any]] = {
            "slide": {"quickhash": slide.quickhash, "mpp": slide.mpp},
            "model": {"sha256": self.segmenter.info.sha256},
        }
        for what, wanted in own.items():
            found = sidecar.get(what)
            for key, value in wanted.items():
                if not isinstance(found, dict) or found.get(key) != value:
                    raise OutputError(
                        f"{self.settings.out / task.stem}.json: these are outputs of another {what}"
                        f" ({key} differs); choose another --out, or --overwrite them"
                    )
        return True

    def _is_known(self, slide: Slide, task: Task) -> bool:
        """Whether another file of the same DICOM series was taken already; says so."""
        series = slide.properties.get("dicom.SeriesInstanceUID")
        if series is None:
            return False
        first = self._series.setdefault(series, task.path)
        if first == task.path:
            return False
        click.echo(f"{task.stem}: the same DICOM slide as {first.name}, skipped")
        return True

    def _warn_stain(self, canvas: Canvas, task: Task) -> None:
        """Say where a model's stain normalisation could not be done."""
        if canvas.record["status"] == "ok" and (
            canvas.record["parameters"].get("stain_matrix", ()) is None
        ):
            click.echo(
                f"wsiseg: warning: {task.path}: too little tissue, or stains unlike H&E: not "
                "normalised to the model's stains",
                err=True,
            )

    def _warn(self, slide: Slide, task: Task) -> None:
        model = self.segmenter.info
        lines = list(slide.warnings)
        if slide.mpp > COARSE * model.mpp:
            lines.append(
                f"{slide.mpp:.4g} um per pixel is too coarse for model {model.name}, which sees "
                f"{model.mpp:g}: the result will mean little"
            )
        for line in lines:
            click.echo(f"wsiseg: warning: {task.path}: {line}", err=True)
