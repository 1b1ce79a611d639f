"""What tests of the command line share."""

from __future__ import annotations

import pytest
from tiny_run import Run, predict, use_tiny_model


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`wsiseg predict` with the tiny model: exit code, output, errors."""
    use_tiny_model(monkeypatch)

    def call(*args: object) -> tuple[int, str, str]:
        code = predict(monkeypatch, *args)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call
