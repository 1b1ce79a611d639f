"""wsiseg: tissue segmentation of whole-slide images.

The public names are resolved when they are first used, so that importing wsiseg is instant and
imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from wsiseg.canvas import Canvas
    from wsiseg.inference.predict import predict_slide
    from wsiseg.models.checkpoint import load_model
    from wsiseg.outputs.geojson import write_geojson
    from wsiseg.outputs.pyramid import write_pyramid
    from wsiseg.slides.slide import Slide, open_slide
    from wsiseg.slides.tissue import find_tissue

_HOMES = {
    "Canvas": "wsiseg.canvas",
    "Slide": "wsiseg.slides.slide",
    "find_tissue": "wsiseg.slides.tissue",
    "load_model": "wsiseg.models.checkpoint",
    "open_slide": "wsiseg.slides.slide",
    "predict_slide": "wsiseg.inference.predict",
    "write_geojson": "wsiseg.outputs.geojson",
    "write_pyramid": "wsiseg.outputs.pyramid",
}

__all__ = [
    "Canvas",
    "Slide",
    "__version__",
    "find_tissue",
    "load_model",
    "open_slide",
    "predict_slide",
    "write_geojson",
    "write_pyramid",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'wsiseg' has no attribute {name!r}")
