"""What the tests know of the run that they look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wsiseg.classes import Classes, TissueClass
from wsiseg.geometry import Size

CLASSES = Classes(
    (
        TissueClass("Stroma <i>", (200, 200, 200), background=True),
        TissueClass("Gland", (0, 160, 0)),
    )
)
ODD = 'b <img src=x onerror=alert(1)> & "q" #1%20 é'
SIZE = Size(1300, 1100)


class Run(NamedTuple):
    """Where the outputs and slides lie, and the labels of slide `a` at 1 um per pixel."""

    out: Path
    slides: Path
    labels: np.ndarray[Any, Any]
