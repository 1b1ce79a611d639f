"""The options of `wsiseg predict`, as what the rooms below take. Knows no algorithm."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wsiseg.errors import UsageError
from wsiseg.inference.cohort import Task
from wsiseg.inference.job import PredictOptions
from wsiseg.names import plain
from wsiseg.outputs.files import OutputOptions
from wsiseg.outputs.geojson import PolygonOptions
from wsiseg.slides.slide import Slide, open_slide

SCANNER_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".dcm", ".vms", ".vmu", ".svslide")
IMAGE_SUFFIXES = (".tif", ".tiff", ".btf", ".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Settings:
    """The options of the command, named as there."""

    inputs: tuple[str, ...]
    out: Path
    model: str
    mpp: float | None
    overlap: int | None
    batch_size: int | None
    workers: int | None
    device: str
    precision: str
    runtime: str
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
    engine: str
    gpus: str | None
    processes: int | None
    address: str | None
    gpu_share: float | None

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
            resume=not self.overwrite,
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

    def tissue_record(self, task: Task) -> dict[str, str | None]:
        """What the record of its outputs says of that: of a file its name and a digest."""
        mode = self.tissue_of(task)
        if mode in ("auto", "none"):
            return {"tissue": mode, "tissue_sha256": None}
        try:
            digest = hashlib.sha256(Path(mode).read_bytes()).hexdigest()
        except OSError as e:
            raise UsageError(f"{mode}: cannot read the tissue mask ({e.strerror or e})") from e
        return {"tissue": plain(Path(mode).name), "tissue_sha256": digest}

    def open(self, task: Task) -> Slide:
        """The slide of a task."""
        mpp = self.mpp if self.mpp is not None else task.mpp
        crop = self.coords == "qupath"
        return open_slide(task.path, backend=self.backend, mpp=mpp, crop_to_bounds=crop)

    def as_record(self) -> dict[str, Any]:
        """The options as they were given, ready for JSON."""
        words = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        words["inputs"] = [plain(text) for text in self.inputs]
        return {k: plain(v) if isinstance(v, str) else v for k, v in words.items()}
