"""The row that compares OpenVINO with torch, with torch in the place of OpenVINO."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from test_benchmark_rows import checkpoint, invoked, module, numbers  # noqa: F401

from wsiseg.models.segmenter import Segmenter


def measured(monkeypatch: pytest.MonkeyPatch, *arguments: object, wrong: float = 0.0) -> Result:
    """The row, whose OpenVINO is torch, wrong by so much where a pixel is dark."""
    runtimes = module("runtimes")

    def stand_in(segmenter: Segmenter, *, precision: str) -> Segmenter:
        head = segmenter.head
        return Segmenter(segmenter.extractor, Off(head, wrong), segmenter.info).eval()

    monkeypatch.setattr(runtimes, "to_openvino", stand_in)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return invoked("runtimes", *arguments)


class Off(torch.nn.Module):
    """A head whose logits of the first class are off."""

    def __init__(self, head: Any, by: float) -> None:
        super().__init__()
        self.head, self.by, self.specs = head, by, head.specs

    def forward(self, features: Any) -> torch.Tensor:
        logits: torch.Tensor = self.head(features)
        return logits + self.by * torch.eye(logits.shape[1])[0][None, :, None, None]


def test_all_ways_are_timed_and_judged(
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = tmp_path / "openvino.json"
    result = measured(monkeypatch, "--model", checkpoint, "--repeats", 1, "--json", report)
    assert result.exit_code == 0, result.output
    found = numbers(report)
    assert [j["target"] for j in found["judged"]] == [1.5, 2.8, 0.999, 0.999]
    assert found["numbers"]["openvino fp32, equal labels"] == 1
    assert found["numbers"]["torch fp32, gain"] == 1
    assert all(j["measured"] > 0 for j in found["judged"])


def test_other_probabilities_end_with_1(
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = tmp_path / "openvino.json"
    result = measured(monkeypatch, "--model", checkpoint, "--json", report, wrong=0.1)
    assert result.exit_code == 1
    assert "NOT EQUAL" in result.output
    assert numbers(report)["judged"] == []


def test_without_openvino_nothing_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module("runtimes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report = tmp_path / "openvino.json"
    result = invoked("runtimes", "--json", report)
    assert result.exit_code == 0, result.output
    assert "not installed" in result.output
    assert numbers(report)["judged"] == []
