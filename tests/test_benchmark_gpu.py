"""benchmarks/gpu.py runs small on a CPU: the stages are those of a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_benchmarks import module

from wsiseg.errors import UsageError


def test_it_runs_small(tmp_path: Path) -> None:
    words = "--device cpu --model small --batch 2 --size 1300 300 --seconds 300"
    numbers = tmp_path / "numbers.json"
    stages = "ceilings,kernels,networks,parts,end_to_end"
    result = CliRunner().invoke(
        module("gpu").main, [*words.split(), "--stages", stages, "--json", str(numbers)]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(numbers.read_text())
    assert found["failed"] == []
    assert found["numbers"]["matrix_tflops"] > 0
    assert set(found["numbers"]["parts_ms"]) == {"vit", "first_stage", "unet", "head"}
    assert found["numbers"]["end_to_end"]["tiles"] > 0
    assert "SUMMARY" in result.output


def test_a_stage_that_is_none_is_told_before_the_work() -> None:
    words = "--device cpu --model small --stages ceilings,kernel"
    result = CliRunner().invoke(module("gpu").main, words.split())
    assert isinstance(result.exception, UsageError)
    assert "--stages kernel: not one of ceilings, kernels" in str(result.exception)
    assert not result.output


def test_a_stage_that_fails_or_has_no_time_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = module("gpu")

    def broken(bench: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.STAGES, "kernels", (broken, 0))
    monkeypatch.setitem(gpu.STAGES, "labels", (broken, 1e9))
    words = "--device cpu --model small --stages kernels,labels,ceilings"
    result = CliRunner().invoke(gpu.main, words.split())
    assert result.exit_code == 1
    assert "kernels: FAILED, RuntimeError: no such kernel" in result.output
    assert "labels: left out" in result.output
    assert "TFLOP/s" in result.output.split("SUMMARY")[1]
