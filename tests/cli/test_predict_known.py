"""What `wsiseg predict` says of outputs that are there and are not quite what is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from shapely.errors import GEOSException
from tiny_run import Run, names, outputs_of, slides

from wsiseg.cli import cli


@pytest.fixture
def done(run: Run, tmp_path: Path) -> tuple[Path, Path]:
    """The folders of a slide and of its outputs."""
    folder, out = slides(tmp_path / "slides", "a"), tmp_path / "out"
    assert run(folder, "--out", out, "--precision", "fp32")[0] == 0
    return folder, out


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--precision", "bf16"), "; made with --precision fp32"),
        (("--keep-canvas",), "; no canvas was kept, --overwrite --keep-canvas makes one"),
        (("--tolerance", "9"), "; its polygons were made with other settings"),
        ((), "(--overwrite makes them again)"),
        (("--precision", "auto"), "(--overwrite makes them again)"),
    ],
)
def test_what_complete_outputs_are_not_is_said(
    run: Run, done: tuple[Path, Path], option: tuple[str, ...], said: str
) -> None:
    code, out, err = run(done[0], "--out", done[1], *option)
    assert code == 0
    (line,) = (text for text in (out + err).splitlines() if "outputs are complete, skipped" in text)
    assert line.endswith(said)


def test_outputs_of_some_kinds_are_made_complete_from_the_canvas(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*_: object, **__: object) -> None:
        raise GEOSException("side location conflict")

    folder, out = slides(tmp_path / "slides", "a"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("wsiseg.outputs.files.write_geojson", give_up)
        assert run(folder, "--out", out)[0] == 1
    words = ["export", str(out / "a.canvas"), "--out", str(out), "--only", "mask,overview"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    code, said, err = run(folder, "--out", out, "--tolerance", "2")
    assert code == 0, err
    assert "skipped" not in said + err
    assert names(out) == outputs_of("a")


def test_a_canvas_that_was_kept_is_not_missed(run: Run, tmp_path: Path) -> None:
    words = (slides(tmp_path / "slides", "a"), "--out", tmp_path / "out", "--keep-canvas")
    assert run(*words)[0] == 0
    assert "no canvas" not in "".join(run(*words)[1:])


def test_an_option_that_is_taken_over_a_table_is_warned_of(run: Run, tmp_path: Path) -> None:
    folder, table = slides(tmp_path / "slides", "a"), tmp_path / "t.csv"
    table.write_text(f"path,mpp,tissue\n{next(folder.iterdir())},0.25,none\n")
    code, _, err = run(table, "--out", tmp_path / "out", "--mpp", "0.5", "--dry-run")
    assert code == 0
    assert "--mpp 0.5 is taken for all slides; a table says otherwise of 1 of them, such as" in err
    assert "--tissue" not in err
