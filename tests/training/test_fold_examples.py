"""examples/pool_folds.py: a class that a fold lacks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_class_that_a_fold_has_no_label_of_is_left_out() -> None:
    matrix = np.array([[59, 0, 1], [0, 40, 0], [0, 0, 0]])  # a stray pixel of c
    line = example("pool_folds").line("1/3", matrix, ["a", "b", "c"])
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    mean = (118 / 119 + 1) / 2
    assert cells[:3] == ["1/3", "0.990", f"{mean:.3f}"]
    assert cells[4:] == ["0.992", "0.983", "1.000", "1.000", "", ""]
