"""A way out of the torch/torchvision mismatch trap. Knows nothing of wsiseg.

timm (and diffusers, where transformers is installed) import torchvision. The torchvision wheel on
PyPI is built against the CUDA torch; beside a CPU torch its compiled operators do not load, and
the import dies with "operator torchvision::nms does not exist", although nothing here uses them.
Declaring the schemas of the two operators that torchvision registers fake kernels for lets the
import succeed. This is done only after torchvision itself has failed to import for that reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: Any = None  # must live as long as the schemas


def ensure_torchvision_imports() -> bool:
    """Make `import torchvision` work where only its compiled operators are missing.

    Returns:
        Whether the missing operator schemas had to be declared.

    Raises:
        RuntimeError: torchvision fails to import for another reason.
    """
    global _library
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
        return False
    except RuntimeError as e:
        if "torchvision::" not in str(e) or _library is not None:
            raise
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library: Any = torch.library
    _library = library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        _library.define(schema)
    importlib.import_module("torchvision")
    return True
