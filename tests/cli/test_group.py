"""The group of commands."""

from __future__ import annotations

from click.testing import CliRunner

from wsiseg.cli import cli


def test_the_nearest_command_is_named() -> None:
    result = CliRunner().invoke(cli, ["predct", "x.svs"])
    assert result.exit_code == 2
    assert "No such command 'predct'. Did you mean predict?" in result.output
    result = CliRunner().invoke(cli, ["zzz"])
    assert result.exit_code == 2
    assert "Did you mean" not in result.output
