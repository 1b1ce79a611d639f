from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsiseg.classes import Classes, TissueClass
from wsiseg.errors import OutputError
from wsiseg.training.calibration import Reliability
from wsiseg.training.metrics import pixel_metrics
from wsiseg.training.panels import panel_file
from wsiseg.training.published import CAVEAT, published_rows
from wsiseg.training.report import write_report
from wsiseg.training.report_style import STYLE

CLASSES = Classes(
    (TissueClass("Other", (200, 200, 210), background=True), TissueClass("<b>Gland</b>", (1, 2, 3)))
)
MATRIX = np.array([[90, 10], [25, 75]])
VOID = {"meta", "img", "line", "rect", "br"}


class Page(HTMLParser):
    """Text, attributes and rows of a page; fails where tags do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self.open):
            return
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def metrics(**changes: Any) -> dict[str, Any]:
    return {
        "model": "small <i>model</i>",
        "sha256": "ab" * 32,
        "dataset": {"name": "glas", "classes": "glands"},
        "split": "testA",
        "fold": None,
        "tta": True,
        "seeds": [0, 3],
        "images": 12,
        "pixel": pixel_metrics(MATRIX, CLASSES),
        "per_image": {"accuracy": 0.8111, "dice": 0.7222, "miou": 0.6333},
        "object": None,
        "licence": "Apache-2.0",
        "command": 'wsiseg evaluate --data "a & b"',
        **changes,
    }


def image_rows(number: int = 12) -> dict[str, dict[str, float | None]]:
    return {
        f"image {i} <u>": {"accuracy": 0.5, "dice": 0.9 - 0.05 * i, "miou": 0.4}
        for i in range(number)
    }


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    files = []
    for name in image_rows():
        path = tmp_path / panel_file(name)
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(path)
        files.append(path)
    Image.new("RGB", (200, 150), (9, 9, 9)).save(tmp_path / "confusion.png")
    return {"confusion": tmp_path / "confusion.png", "panels": files}


def write(path: Path, **changes: Any) -> tuple[str, Page]:
    given: dict[str, Any] = {"classes": CLASSES, "rows": image_rows(), "images": {}, **changes}
    write_report(path, given.pop("report", metrics()), **given)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_numbers_stand_in_their_rows(tmp_path: Path) -> None:
    _, page = write(tmp_path / "report.html")
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["Accuracy"][:2] == ["0.8250", "0.8111"]
    dice = (2 * 90 / (100 + 115) + 2 * 75 / (100 + 85)) / 2
    assert rows["Dice"][:2] == [f"{dice:.4f}", "0.7222"]
    assert rows["F1"][:2] == rows["Dice"][:2]
    iou, precision = 75 / 110, 75 / 85
    assert rows["<b>Gland</b>"][1:] == [f"{iou:.4f}", f"{precision:.4f}", "0.7500", "50.0%"]
    text = " ".join(page.text)
    for part in ("glas; classes = glands", "testA", "ab" * 32, "0, 3", "Apache-2.0", '"a & b"'):
        assert part in text
    assert "25.0% of the pixels of <b>Gland</b> were called Other." in text
    assert "pooled confusion matrix" in text
    assert "neither in an image nor in its prediction is left out" in text
    assert "Fold" not in text
    assert "Objects" not in text


def test_colours_and_bars_are_printed() -> None:
    (selectors,) = re.findall(r"([^{}]*)\{ print-color-adjust: exact; \}", STYLE)
    filled = {".tile", ".note", ".swatch", "td.bar", "tr.ours > *", "svg"}
    assert {s.strip() for s in selectors.split(",")} == filled


def test_names_are_escaped(tmp_path: Path, pictures: dict[str, Any]) -> None:
    text, page = write(tmp_path / "report.html", images=pictures)
    assert not {"b", "i", "u"} & {tag for tag, _ in page.tags}
    assert "<b>Gland" not in text
    assert "image 3 <u>" in "".join(page.text)


def test_nothing_outside_the_file_is_asked_for(tmp_path: Path, pictures: dict[str, Any]) -> None:
    text, page = write(
        tmp_path / "report.html",
        images=pictures,
        published=published_rows({"name": "glas"}, "testA"),
    )
    outside = re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?://|url\(|@import|<link|<iframe", outside)
    for _, attributes in page.tags:
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
        assert (attributes.get("href") or "#").startswith("#")
    targets = {a.get("id") for _, a in page.tags}
    links = [a["href"] for t, a in page.tags if t == "a"]
    assert len(links) == 12
    assert {str(link)[1:] for link in links} <= targets


def test_pictures_are_in_the_file(tmp_path: Path, pictures: dict[str, Any]) -> None:
    _, page = write(tmp_path / "report.html", images=pictures)
    found = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(found) == 1 + 12
    for i, attributes in enumerate(found):
        kind, _, data = str(attributes["src"]).partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            picture.load()
            assert kind == f"data:image/{str(picture.format).lower()}"
            assert picture.size == ((200, 150) if i == 0 else (120, 90))
    text = "".join(page.text)
    low, middle, high = (text.index(f"{w} third by Dice") for w in ("Lowest", "Middle", "Highest"))
    places = [text.index(f"image {i} <u>: Dice {0.9 - 0.05 * i:.4f}") for i in range(12)][::-1]
    assert places == sorted(places)
    assert low < places[0] < places[3] < middle < places[4] < places[7] < high < places[8]


def test_images_are_listed_worst_first_and_unknown_values_are_dashes(tmp_path: Path) -> None:
    rows = image_rows(3)
    rows["lost"] = {"accuracy": 0.1, "dice": float("nan"), "object_hausdorff": None}
    rows["image 1 <u>"]["object_hausdorff"] = 31.25
    _, page = write(tmp_path / "report.html", rows=rows)
    start = next(i for i, row in enumerate(page.rows) if row and row[0] == "Image")
    assert page.rows[start] == ["Image", "Accuracy", "Dice", "Mean IoU", "Object Hausdorff (px)"]
    body = page.rows[start + 1 : start + 5]
    assert [row[0] for row in body] == ["lost", "image 2 <u>", "image 1 <u>", "image 0 <u>"]
    assert body[0][1:] == ["0.1000", "-", "-", "-"]
    assert body[2][1:] == ["0.5000", "0.8500", "0.4000", "31.25"]


def test_objects_and_published_rows(tmp_path: Path) -> None:
    inner = {"f1": 0.61, "dice": 0.62, "hausdorff": 63.3}
    report = metrics(object={"f1": 0.71, "dice": 0.72, "hausdorff": 73.456, "per_image": inner})
    published = published_rows({"name": "glas"}, "testA")
    _, page = write(tmp_path / "report.html", report=report, published=published)
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["Object Hausdorff (px)"][:2] == ["73.46", "63.30"]
    assert rows["Object F1"][:2] == ["0.7100", "0.6100"]
    head = rows["Method"]
    ours = dict(zip(head, rows["This model"], strict=True))
    paper = dict(zip(head, rows["PathSegDiff"], strict=True))
    assert (ours["Accuracy"], ours["Object Dice"]) == ("0.8250", "0.7200")
    assert (paper["Part"], paper["Accuracy"], paper["Object F1"]) == ("testB", "0.900", "-")
    assert "45.42" in "".join(page.text)
    assert CAVEAT in "".join(page.text)


def test_calibration_has_its_section_where_it_was_measured(
    tmp_path: Path, pictures: dict[str, Any]
) -> None:
    tally = Reliability()
    tally.add(np.float32([[[0.9, 0.7]], [[0.1, 0.3]]]), np.uint8([[0, 1]]))
    report = metrics(calibration=tally.summary())
    reliability = {**pictures, "reliability": pictures["confusion"]}
    _, page = write(tmp_path / "report.html", report=report, images=reliability)
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["Expected calibration error"][0] == "0.4000"
    assert rows["Largest gap"][0] == "0.7000"
    assert rows["Log loss"][0] == f"{-np.log(0.9 * 0.3) / 2:.4f}"
    assert rows["Brier score"][0] == f"{(0.02 + 0.98) / 2:.4f}"
    assert "2 labelled pixels" in "".join(page.text)
    assert [a["alt"] for t, a in page.tags if t == "img"][1] == "Reliability diagram"
    _, page = write(tmp_path / "report.html", report=metrics(calibration=None))
    assert "Can the probabilities be trusted?" not in "".join(page.text)


def test_a_class_that_does_not_occur_and_no_images(tmp_path: Path) -> None:
    empty = pixel_metrics(np.array([[5, 0], [0, 0]]), CLASSES)
    _, page = write(tmp_path / "report.html", report=metrics(pixel=empty, images=0), rows={})
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["<b>Gland</b>"] == ["-", "-", "-", "-", "0.0%"]


def test_damaged_pictures_and_folders(tmp_path: Path, pictures: dict[str, Any]) -> None:
    pictures["confusion"].write_text("no picture")
    with pytest.raises(OutputError, match="cannot be read as a picture"):
        write(tmp_path / "report.html", images=pictures)
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        write(tmp_path / "file" / "report.html")
