"""The parts of a prediction's record that say which slide and which versions. Knows no models."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsiseg import __version__
from wsiseg.inference.contracts import SlideLike


def slide_record(slide: SlideLike) -> dict[str, Any]:
    """A slide as plain data."""
    bounds = slide.bounds
    return {
        "path": Path(slide.path).name,
        "quickhash": slide.quickhash,
        "mpp": slide.mpp,
        "mpp_source": slide.mpp_source,
        "vendor": slide.vendor,
        "backend": slide.backend,
        "frame": slide.frame,
        "bounds": None if bounds is None else list(bounds),
        "size": list(slide.size),
    }


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "wsiseg": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
