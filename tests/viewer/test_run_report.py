"""The report page: read back with an HTML parser."""

from __future__ import annotations

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from click.testing import CliRunner
from PIL import Image
from viewer_run import ODD, Run

from wsiseg.cli import cli
from wsiseg.errors import UsageError
from wsiseg.outputs.run_folder import read_run
from wsiseg.viewer.report import write_report


class Page(HTMLParser):
    """Tags, addresses and the text of each row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href") and v != "data:,"]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


@pytest.fixture
def run(made_run: Run, tmp_path: Path) -> Path:
    """A copy of the run whose folder has an odd name, with a failed and an unfinished slide."""
    out = tmp_path / "out <b>"
    shutil.copytree(made_run.out, out)
    (out / "left.canvas").mkdir()
    (out / "summary.csv").write_text("path,status,error\ngone.svs,failed,<i>cut</i> short\n")
    return out


def test_it_shows_every_slide_and_needs_nothing_else(run: Path, made_run: Run) -> None:
    result = CliRunner().invoke(cli, ["report", str(run)])
    assert result.exit_code == 0, result.output
    assert "4 slides, 2 without a usable result" in result.output
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    head, *rows, total = page.rows
    column = {name: i for i, name in enumerate(head)}
    by_name = {r[column["Slide"]]: r for r in rows}
    assert set(by_name) == {"a.tif", f"{ODD}.tif", "gone.svs", "left"}
    assert by_name["gone.svs"][column["Status"]] == "failed<i>cut</i> short"
    assert by_name["left"][column["Status"]].startswith("incomplete")
    gland = (made_run.labels == 2).sum() * 1e-6
    stroma = (made_run.labels == 1).sum() * 1e-6
    shown = by_name["a.tif"][column["Gland mm²"]]
    assert shown == f"{gland:.3f}{100 * gland / (gland + stroma):.1f}%"
    sums = sum(r.areas_mm2.get("Gland", 0) for r in read_run(run))
    assert total[column["Gland mm²"]].startswith(f"{sums:.3f}")
    assert "Stroma <i> mm²" in column
    assert by_name["a.tif"][column["Analysis s"]] == "12.5"


def test_nothing_in_a_name_becomes_markup_or_leads_away(run: Path) -> None:
    write_report(run / "r.html", run, read_run(run))
    page = Page((run / "r.html").read_text(encoding="utf-8"))
    assert page.handlers == []
    assert page.tags.count("script") == 1
    assert {"b", "iframe"}.isdisjoint(page.tags)
    pictures = [a for a in page.addresses if a.startswith("data:image/jpeg;base64,")]
    links = [a for a in page.addresses if a.startswith("./")]
    assert len(pictures) == 2
    assert sorted(pictures + links) == sorted(page.addresses)
    for picture in pictures:
        Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).load()
    assert {unquote(a) for a in links} == {"./a.overview.png", f"./{ODD}.overview.png"}
    assert all((run / unquote(a)).is_file() for a in links)


def test_elsewhere_it_leads_to_the_run(run: Path, tmp_path: Path) -> None:
    write_report(tmp_path / "x" / "r.html", run, read_run(run))
    page = Page((tmp_path / "x" / "r.html").read_text(encoding="utf-8"))
    links = [unquote(a) for a in page.addresses if not a.startswith("data:")]
    assert links
    assert all((tmp_path / "x" / a).is_file() for a in links)


def test_a_damaged_overview_and_a_mixed_run_are_said(run: Path) -> None:
    (run / "a.overview.png").write_bytes(b"no picture")
    sidecar = run / "a.json"
    sidecar.write_text(sidecar.read_text().replace("ab" * 32, "cd" * 32))
    write_report(run / "r.html", run, read_run(run))
    text = (run / "r.html").read_text(encoding="utf-8")
    assert text.count("data:image/jpeg") == 1
    assert "not all analysed with the same model file" in text


def test_bad_requests_are_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.html"):
        write_report(run / "a.json", run, read_run(run))
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(cli, ["report", str(tmp_path / "empty")])
    assert isinstance(result.exception, UsageError)


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "picture"])
def test_what_cannot_be_read_is_called_damaged(damage: str, run: Path) -> None:
    mask = run / "a.mask.ome.tif"
    sidecar = run / "a.json"
    if damage == "empty":
        mask.write_bytes(b"")
    elif damage == "cut":
        mask.write_bytes(mask.read_bytes()[:-400])
    elif damage == "picture":
        (run / "a.overview.png").write_bytes(b"no picture")
    else:
        record = json.loads(sidecar.read_text())
        record["mask"]["size"][0] += 1
        sidecar.write_text(json.dumps(record))
    result = CliRunner().invoke(cli, ["report", str(run)])
    assert "4 slides, 3 without a usable result" in result.output
    head, *rows, _ = Page((run / "report.html").read_text(encoding="utf-8")).rows
    (own,) = (r for r in rows if r[head.index("Slide")] == "a.tif")
    assert own[head.index("Status")].startswith("damaged")
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "but with the areas that are known of 1 of them" in text
