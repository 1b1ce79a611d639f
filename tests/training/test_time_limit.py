"""Training for a time: what a run leaves whose clock ends it."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
import torch
from discs import config, fit

from wsiseg.errors import ConfigError
from wsiseg.models.checkpoint import load_model
from wsiseg.training.loop import LoopConfig

LOOP = {"steps": 10**6, "minutes": 1.0, "save_every": 1000, "log_every": 1}


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each look at moves by four seconds."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 4.0
        return now[0]

    monkeypatch.setattr(time, "monotonic", monotonic)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_training_whose_time_is_up_writes_its_model(
    tmp_path: Path, ticking: None, share: float
) -> None:
    run = config(loop=LOOP, validation_share=share, validate_every=10**6)
    path = fit(run, tmp_path)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert 1 < len(rows) < 20
    assert float(rows[-1]["learning_rate"]) < 0.3 * float(rows[1]["learning_rate"])
    validated = tmp_path / "validation.csv"
    assert validated.exists() == bool(share)
    if share:  # the last step is looked at
        assert validated.read_text().splitlines()[-1].split(",")[0] == rows[-1]["step"]
    before = path.read_bytes()
    again = fit(run, tmp_path, resume=True)  # complete: nothing is trained
    assert again.read_bytes() == before
    weights = [p.flatten() for p in load_model(str(path)).parameters()]
    assert torch.isfinite(torch.cat(weights)).all()


def test_a_time_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"loop.minutes -1.0: must not be negative"):
        LoopConfig(minutes=-1.0)
