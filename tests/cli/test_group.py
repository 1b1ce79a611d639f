"""The group of commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from wsiseg.cli import cli
from wsiseg.errors import DatasetError


def test_the_nearest_command_is_named() -> None:
    result = CliRunner().invoke(cli, ["predct", "x.svs"])
    assert result.exit_code == 2
    assert "No such command 'predct'. Did you mean predict?" in result.output
    result = CliRunner().invoke(cli, ["zzz"])
    assert result.exit_code == 2
    assert "Did you mean" not in result.output


def test_a_data_folder_that_is_missing_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = ["--dataset", "glas", "--out", str(tmp_path / "run"), "--data"]
    result = CliRunner().invoke(cli, ["train", *rest, "~/none"])
    assert result.exit_code == 2
    assert "none' does not exist" in result.output
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "none").mkdir()
    result = CliRunner().invoke(cli, ["train", *rest, "~/none"])
    assert "does not exist" not in result.output
    assert isinstance(result.exception, DatasetError)
