"""The parts of a prediction's record that say which slide, which versions and what it took."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsiseg import __version__
from wsiseg.inference.contracts import SlideLike
from wsiseg.inference.engine import Stopwatch
from wsiseg.inference.features import Schedule
from wsiseg.names import plain


def slide_record(slide: SlideLike) -> dict[str, Any]:
    """A slide as plain data."""
    bounds = slide.bounds
    return {
        "path": plain(Path(slide.path).name),
        "quickhash": slide.quickhash,
        "mpp": slide.mpp,
        "mpp_source": slide.mpp_source,
        "vendor": slide.vendor,
        "backend": slide.backend,
        "frame": slide.frame,
        "bounds": None if bounds is None else list(bounds),
        "size": list(slide.size),
    }


def versions(runtime: str = "torch") -> dict[str, str]:
    """Versions of what computes, with that of the library which runs the networks."""
    other = {} if runtime == "torch" else {runtime: version(runtime)}
    return {
        "wsiseg": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **other,
    }


def timings(
    watch: Stopwatch,
    *,
    loads: Schedule | None,
    windows: int,
    spilled: int,
    continued: int,
    most: Mapping[str, int],
) -> dict[str, Any]:
    """What a run took and did; `continued` chunks were done by earlier ones, and `most` is how many
    tiles and windows at a time fitted into the memory of the device, where not all did."""
    total = watch.total
    encoded, again = (0, 0) if loads is None else (len(loads.tiles), loads.recomputed)
    seconds = dict.fromkeys(("read", "encode", "head", "blend"), 0.0) | watch.seconds
    return {
        **{part: round(s, 3) for part, s in seconds.items()},
        "total": round(total, 3),
        "windows": windows,
        "tiles": encoded,
        "tiles_distinct": encoded - again,
        "tiles_recomputed": again,
        "chunks_spilled": spilled,
        "chunks_continued": continued,
        "tiles_per_s": round(encoded / total, 3) if total > 0 else 0.0,
        **{f"{what}_at_a_time": count for what, count in most.items()},
    }
