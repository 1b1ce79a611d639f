"""Killed at any moment, continued, the same bytes; `kill_predict.py` does it many more times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
@pytest.mark.parametrize("model", [[], ["--border"]])
def test_killed_at_random_moments_nothing_is_lost(model: list[str]) -> None:
    script = Path(__file__).with_name("kill_predict.py")
    ended = subprocess.run(
        [sys.executable, str(script), "--kills", "6", "--seed", "7", *model],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    assert report["wrong"] == []
    assert report["kills"] >= 6
    assert report["windows"] == 20
    assert report["continued"] >= 1
