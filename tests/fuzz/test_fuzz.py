"""A small share of the fuzzing that `python tests/fuzz/run.py` does for as long as is asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from run import fuzz

COUNTS = {"slides": 120, "checkpoints": 60, "tables": 150, "yaml": 100, "geojson": 150}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")


@pytest.mark.parametrize("kind", COUNTS)
def test_hostile_inputs_are_taken_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    tally = fuzz(kind, seed=7, count=COUNTS[kind], seconds=600, folder=tmp_path)
    assert tally.tried == COUNTS[kind]
    assert not tally.offences, tally.offences[0]
    assert tally.counts["accepted"] > 0  # the unharmed parts still work
    assert tally.counts["refused"] > 0
