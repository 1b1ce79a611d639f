"""The loop's bookkeeping: rates, claimed folders, damaged states, losses that run away."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wsiseg.atomic import staged
from wsiseg.config import from_mapping
from wsiseg.datasets.augment import AugmentConfig
from wsiseg.errors import CheckpointError, ConfigError, ModelError, OutputError, UsageError
from wsiseg.training.claim import claim_run
from wsiseg.training.dino import DinoConfig
from wsiseg.training.files import append_row, cut_rows, read_state, resume_step
from wsiseg.training.loop import (
    LoopConfig,
    learning_rate,
    run_loop,
)
from wsiseg.training.losses import LossConfig
from wsiseg.training.tiles import SourceConfig


class Line:
    """Fits y = w x; `scale` multiplies the loss."""

    def __init__(self, scale: float = 1.0) -> None:
        torch.manual_seed(0)
        self.module, self.scale = nn.Linear(1, 1), scale
        self.steps: list[int] = []

    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def losses(self, batch: Any, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        x = torch.rand(4, 1, generator=generator)
        return {"loss": self.scale * (self.module(x) - 3 * x).square().mean()}

    def after_step(self, step: int, gone: float) -> None:
        self.steps.append(step)


def endless() -> Iterator[None]:
    while True:
        yield None


def test_learning_rate_rises_and_falls_on_a_cosine() -> None:
    config = LoopConfig(steps=110, warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate(config, s) for s in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert rates[110] == pytest.approx(0.02)
    assert learning_rate(LoopConfig(steps=5, warmup_steps=0, learning_rate=1.0), 0) == 1.0


def test_a_run_ends_when_its_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(Line):
        def losses(
            self, batch: None, step: int, generator: torch.Generator
        ) -> Mapping[str, Tensor]:
            now[0] += 6.0
            return super().losses(batch, step, generator)

        def after_step(self, step: int, gone: float) -> None:
            super().after_step(step, gone)
            if step == stop_at:
                raise KeyboardInterrupt

    config = LoopConfig(
        steps=10**6, minutes=1.0, warmup_steps=0, log_every=1, save_every=1, learning_rate=1.0
    )
    stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        run_loop(Slow(), endless(), config, run=tmp_path, seed=0)
    now[0] += 1000.0  # the machine was away
    stop_at = -1
    state = resume_step(tmp_path / "state.pt")
    assert state[0] == 4
    task = Slow()
    run_loop(task, endless(), config, run=tmp_path, seed=0, state=state)
    assert task.steps == [4, 5, 6, 7, 8, 9]  # ten steps of six seconds
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    expected = [0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    assert [float(r["learning_rate"]) for r in rows] == pytest.approx(expected)
    assert resume_step(tmp_path / "state.pt")[0] == config.steps  # complete


def test_a_resumed_run_logs_each_step_once(tmp_path: Path) -> None:
    config = LoopConfig(steps=6, warmup_steps=0, log_every=1, save_every=6)
    short = LoopConfig(steps=4, warmup_steps=0, log_every=1, save_every=2)
    run_loop(Line(), endless(), short, run=tmp_path, seed=0)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["step"] = 2  # as if the run had been killed after its fourth line
    task = Line()
    run_loop(task, endless(), config, run=tmp_path, seed=0, state=(2, state))
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert [r.split(",")[0] for r in rows] == ["step", "1", "2", "3", "4", "5", "6"]
    assert task.steps == [2, 3, 4, 5]
    assert resume_step(tmp_path / "state.pt")[0] == 6


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not finite at step 1; try a lower loop\.learning_rate"):
        run_loop(Line(math.inf), endless(), LoopConfig(), run=tmp_path, seed=0)
    assert not (tmp_path / "state.pt").exists()


def test_a_folder_is_claimed_by_a_run_that_began(tmp_path: Path) -> None:
    first, second = LoopConfig(steps=1), LoopConfig(steps=2)
    claim_run(tmp_path, first, resume=False)
    claim_run(tmp_path, second, resume=False)  # the first never began
    append_row(tmp_path / "log.csv", {"step": 1})
    with pytest.raises(UsageError, match="holds a run already; give --resume"):
        claim_run(tmp_path, second, resume=False)
    with pytest.raises(UsageError, match=r"another configuration \(steps was 2 and is 1\)"):
        claim_run(tmp_path, first, resume=True)
    claim_run(tmp_path, second, resume=True)


def test_what_cannot_be_written_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*check free space"):
        claim_run(tmp_path / "file", LoopConfig(), resume=False)
    with pytest.raises(OutputError, match="cannot be written"):
        append_row(tmp_path / "file" / "log.csv", {"step": 1})
    target = tmp_path / "kept"
    target.write_text("old")

    def stopped() -> None:
        with staged(target) as (temporary,):
            temporary.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()

    def failing(*also: type[Exception]) -> None:
        with staged(target, also=also) as (temporary,):
            temporary.write_text("new")
            raise RuntimeError("the disk is full")

    with pytest.raises(OutputError, match=r"cannot write \(the disk is full\)"):
        failing(RuntimeError)
    with pytest.raises(RuntimeError):
        failing()
    assert target.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "kept"]
    assert target.read_text() == "old"


def test_columns_of_a_table_stay(tmp_path: Path) -> None:
    path = tmp_path / "validation.csv"
    append_row(path, {"step": 1, "a": 2.0, "b": 3.0})
    append_row(path, {"step": 2, "b": 4.0, "c": 5.0})
    assert path.read_text().split() == ["step,a,b", "1,2.0,3.0", "2,nan,4.0"]


def test_an_empty_table_gets_its_header(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.touch()
    append_row(path, {"step": 1, "loss": 0.5})
    append_row(path, {"step": 2, "loss": 0.25})
    assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.25"]


def test_a_run_goes_on_where_no_curves_can_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("no,steps\n")
    config = LoopConfig(steps=4, warmup_steps=0, log_every=2, save_every=2)
    with pytest.warns(UserWarning, match=r"no curves are drawn: .*log\.csv: is not there"):
        run_loop(Line(), endless(), config, run=tmp_path, seed=0)
    assert resume_step(tmp_path / "state.pt")[0] == 4


def test_a_cut_table_keeps_its_line_endings(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    for step in (1, 2, 3):
        append_row(path, {"step": step, "loss": 0.5})
    whole = path.read_bytes()
    cut_rows(path, 2)
    append_row(path, {"step": 3, "loss": 0.5})
    assert path.read_bytes() == whole


def test_rows_after_a_step_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    cut_rows(path, 3)
    assert not path.exists()
    for step in (1, 3, 5):
        append_row(path, {"step": step, "loss": 0.5})
    cut_rows(path, 3)
    assert path.read_text().split() == ["step,loss", "1,0.5", "3,0.5"]


@pytest.mark.parametrize("torn", [b"30,0.2", b"30,0.25\r", b"30", b"30,0.2530,0.25\r\n"])
def test_torn_rows_are_cut_before_others_are_added(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "log.csv"
    append_row(path, {"step": 10, "loss": 0.5})
    path.write_bytes(path.read_bytes() + torn)
    cut_rows(path, 30)
    append_row(path, {"step": 40, "loss": 0.5})
    assert path.read_text().split() == ["step,loss", "10,0.5", "40,0.5"]
    path.write_bytes(b"step,lo")
    cut_rows(path, 30)
    append_row(path, {"step": 40, "loss": 0.5})
    assert path.read_text().split() == ["step,loss", "40,0.5"]


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02cos\nsystem\n.", b"PK\x03\x04"])
def test_a_damaged_state_is_said_in_a_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.pt"
    assert resume_step(path) == (0, None)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable training state") as caught:
        resume_step(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (LoopConfig, {"steps": 0}, r"loop\.steps 0: must be at least 1"),
        (LoopConfig, {"batch_size": 0}, r"loop\.batch_size"),
        (LoopConfig, {"learning_rate": 0.0}, r"loop\.learning_rate"),
        (LoopConfig, {"warmup_steps": -1}, r"loop\.warmup_steps"),
        (LossConfig, {"cross_entropy": 0.0}, "one must be above 0"),
        (AugmentConfig, {"scale": [0.0, 1.0]}, r"augment\.scale \[0\.0, 1\.0\]"),
        (AugmentConfig, {"scale": [2.0, 1.0]}, r"augment\.scale"),
        (AugmentConfig, {"stain_gain": 1.0}, "stain_gain"),
        (DinoConfig, {"local_scale": [0.5, 2.0]}, r"dino\.local_scale: area shares"),
        (DinoConfig, {"teacher_temperature": 0.0}, "temperatures"),
        (SourceConfig, {"path": "/data/*.png"}, "relative to the data folder"),
        (SourceConfig, {"path": "*.png", "weight": 0.0}, "weight must be above 0"),
    ],
)
def test_values_that_cannot_be(kind: Any, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(kind, data)


def test_weights_are_read_on_any_machine(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(buffer.getvalue().replace(b"\x03\x00\x00\x00cpu", b"\x06\x00\x00\x00cuda:0"))
    assert b"cuda:0" in path.read_bytes()
    assert read_state(path, "take last.safetensors")["weight"].device.type == "cpu"
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"last\.safetensors"):
        read_state(path, "take last.safetensors")
