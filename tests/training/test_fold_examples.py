"""examples/pool_folds.py and choose_objects.py: a class that a fold lacks, and requests refused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


@pytest.mark.parametrize(
    ("words", "folds"),
    [
        (["a"], None),
        (["a", "--folds", "1"], None),
        (["a", "b", "c", "--folds", "2"], None),
        (["a", "--folds", "3"], 3),
        (["a", "b"], 2),
    ],
)
def test_runs_without_a_fold_are_refused(
    words: list[str],
    folds: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[int] = []

    def predictions(*_: Any, folds: int, tta: bool) -> None:
        asked.append(folds)
        raise SystemExit(0)

    script = example("choose_objects")
    monkeypatch.setattr(script, "predictions", predictions)
    monkeypatch.setattr(sys, "argv", ["choose_objects.py", "data", *words])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert asked == ([] if folds is None else [folds])
    assert ended.value.code == (2 if folds is None else 0)
    assert ("give --folds N" in capsys.readouterr().err) == (folds is None)
