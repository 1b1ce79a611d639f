"""A long run leaks nothing; `soak.py` does it for longer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux about the process")
def test_many_slides_leave_nothing_open_and_take_no_more_memory() -> None:
    script = Path(__file__).with_name("soak.py")
    ended = subprocess.run(
        [sys.executable, str(script), "--slides", "30"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    assert report["slides"] == 30
    assert report["mib"][0] > 50
    assert report["grown_mib"] < 20
