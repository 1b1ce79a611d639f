from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsiseg.classes import Classes, TissueClass
from wsiseg.errors import OutputError, UsageError
from wsiseg.training import curves
from wsiseg.training.calibration import Reliability
from wsiseg.training.curves import (
    draw_confusion,
    draw_curves,
    draw_label_efficiency,
    draw_reliability,
    read_columns,
    row_shares,
    short_count,
    smoothed,
)
from wsiseg.training.files import append_row


def write_log(run: Path, rows: int = 30) -> None:
    run.mkdir(exist_ok=True)
    for i in range(1, rows + 1):
        row = {"step": i * 10, "learning_rate": 1e-4, "seconds": 1.0, "loss": 1 / i, "dice_loss": 1}
        append_row(run / "log.csv", row)


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        return picture.size


def test_curves_with_and_without_validation(tmp_path: Path) -> None:
    run = tmp_path / "run $x^"
    write_log(run)
    assert draw_curves(run) == run / "curves.png"
    plain = size(run / "curves.png")
    for i in (100, 200, 300):
        row = {"step": i, "accuracy": 0.8, "dice": 0.5 + i / 1000, "miou": 0.4}
        append_row(run / "validation.csv", row)
    draw_curves(run)
    assert size(run / "curves.png")[1] == 2 * plain[1]
    assert sorted(p.name for p in run.iterdir()) == ["curves.png", "log.csv", "validation.csv"]


def test_reliability_of_some_pixels_and_of_none(tmp_path: Path) -> None:
    tally = Reliability()
    draw_reliability(tmp_path / "none.png", tally.summary())
    rng = np.random.default_rng(0)
    p = rng.uniform(0, 1, (20, 20)).astype(np.float32)
    tally.add(np.stack([p, 1 - p]), (rng.random((20, 20)) > p).astype(np.uint8))
    draw_reliability(tmp_path / "some.png", tally.summary())
    assert size(tmp_path / "some.png") == size(tmp_path / "none.png")
    pictures = [(tmp_path / f"{n}.png").read_bytes() for n in ("some", "none")]
    assert pictures[0] != pictures[1]


def test_curves_of_one_row_and_of_values_that_are_no_numbers(tmp_path: Path) -> None:
    write_log(tmp_path, 1)
    draw_curves(tmp_path)
    append_row(tmp_path / "log.csv", dict.fromkeys(read_columns(tmp_path / "log.csv"), np.nan))
    append_row(tmp_path / "validation.csv", {"step": 10, "dice": np.nan})
    draw_curves(tmp_path)


def test_curves_of_damaged_logs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"log\.csv: is not there or empty"):
        draw_curves(tmp_path)
    (tmp_path / "log.csv").write_text("step,loss\n")
    with pytest.raises(UsageError, match="empty"):
        draw_curves(tmp_path)
    (tmp_path / "log.csv").write_text("step,loss\n1,0.5\n2,\n")
    with pytest.raises(UsageError, match="not a table of numbers"):
        draw_curves(tmp_path)
    (tmp_path / "log.csv").write_text("step,loss\n1,0.5\n2\n")
    with pytest.raises(UsageError, match="not a table of numbers"):
        draw_curves(tmp_path)


def test_smoothing_against_the_obvious_mean() -> None:
    values = np.array([1.0, 5, np.nan, 2, 8, 4, 4])
    expected = [np.nanmean(values[max(0, i - 1) : i + 2]) for i in range(len(values))]
    assert smoothed(values, 3) == pytest.approx(expected)
    assert smoothed(values[:2], 1).tolist() == [1, 5]


def test_rows_of_the_confusion_matrix() -> None:
    shares = row_shares(np.array([[3, 1], [0, 0]]))
    assert shares[0].tolist() == [0.75, 0.25]
    assert np.isnan(shares[1]).all()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1234, "1.23k"), (99_960, "100k"), (45_678_901, "45.7M")],
)
def test_short_counts(count: int, text: str) -> None:
    assert short_count(count) == text


@pytest.mark.parametrize("number", [1, 2, 6])
def test_confusion_picture(number: int, tmp_path: Path) -> None:
    names = ["Tumour $x^", "a_{b", *"cdef"][:number]
    classes = Classes(tuple(TissueClass(n, (0, 0, 0)) for n in names))
    matrix = np.diag(np.arange(number))  # the first class has no pixels
    draw_confusion(tmp_path / "confusion.png", matrix, classes)
    assert min(size(tmp_path / "confusion.png")) > 200
    with pytest.raises(UsageError, match="classes"):
        draw_confusion(tmp_path / "confusion.png", matrix[:, :0], classes)


def test_a_confusion_picture_of_many_classes_can_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without drawing it, which takes long."""
    sides: list[float] = []
    monkeypatch.setattr(
        curves, "_save", lambda figure, path: sides.extend(figure.get_size_inches())
    )
    classes = Classes(tuple(TissueClass(f"c{k}", (0, 0, 0)) for k in range(110)))
    draw_confusion(tmp_path / "confusion.png", np.zeros((110, 110)), classes)
    assert Image.MAX_IMAGE_PIXELS is not None
    assert sides[0] * sides[1] * curves.DPI**2 < Image.MAX_IMAGE_PIXELS


def test_confusion_shades_follow_the_rows(tmp_path: Path) -> None:
    classes = Classes((TissueClass("a", (0, 0, 0)), TissueClass("b", (0, 0, 0))))

    def dark(matrix: list[list[int]]) -> float:
        draw_confusion(tmp_path / "c.png", np.array(matrix), classes)
        with Image.open(tmp_path / "c.png") as picture:
            return float((np.asarray(picture.convert("L")) < 90).mean())

    assert dark([[10, 0], [0, 1000]]) == pytest.approx(dark([[1000, 0], [0, 10]]), rel=0.02)
    assert dark([[10, 10], [10, 10]]) < 0.2 * dark([[20, 0], [0, 20]])


def test_label_efficiency(tmp_path: Path) -> None:
    table = {"ours $^": {10: [0.7, 0.72], 85: [0.9]}, "other": {20: [0.8], 40: []}}
    draw_label_efficiency(tmp_path / "labels.png", table)
    assert min(size(tmp_path / "labels.png")) > 400
    with pytest.raises(UsageError, match="nothing to draw"):
        draw_label_efficiency(tmp_path / "labels.png", {"ours": {10: []}})
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        draw_label_efficiency(tmp_path / "file" / "labels.png", table)
