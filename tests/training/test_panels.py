from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image, ImageDraw

from wsiseg.classes import Classes, TissueClass
from wsiseg.datasets.glas import GlaS
from wsiseg.errors import OutputError, UsageError
from wsiseg.training import panels
from wsiseg.training.panels import borders, draw_panel, error_kinds, overlay, write_panel

RED, BLUE = (220, 30, 30), (30, 30, 220)
THREE = Classes(
    (
        TissueClass("Rest", (200, 200, 200), background=True),
        TissueClass("Tumour", RED),
        TissueClass("Stroma", BLUE),
    )
)


def test_borders_against_the_obvious_definition() -> None:
    labels = np.random.default_rng(0).choice([0, 1, 2, 255], (14, 17)).astype(np.uint8)
    labels[4:10, 5:12] = 1
    got = borders(labels, 1)
    for y, x in np.ndindex(labels.shape):
        near = labels[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        own = labels[y, x]
        assert got[y, x] == (own != 255 and bool(((near != own) & (near != 255)).any()))


def test_overlay_shows_tissue_borders_and_what_is_not_labelled() -> None:
    image = np.full((60, 60, 3), 180, np.uint8)
    labels = np.zeros((60, 60), np.uint8)
    labels[20:40, 20:40] = 1
    labels[50:] = 255
    got = overlay(image, labels, THREE)
    assert (got[5, 5] == 180).all()  # background: tissue as it is
    assert tuple(got[20, 30]) == RED  # border
    inside = got[30, 30].astype(int)
    assert inside[0] > 180 > inside[1] > 120  # tinted, not covered
    assert len(np.unique(got[50:].reshape(-1, 3), axis=0)) == 2  # hatched: lines and pale tissue
    assert (got[49] == 180).all()  # no border beside what is not labelled


def test_kinds_of_error() -> None:
    truth = np.array([[0, 0, 1, 1, 1, 255, 255]], np.uint8)
    predicted = np.array([[0, 2, 1, 0, 2, 0, 1]], np.uint8)
    assert error_kinds(truth, predicted, THREE).tolist() == [[0, 2, 0, 1, 3, 0, 0]]


def test_errors_are_drawn_where_they_are() -> None:
    image = np.full((440, 440, 3), 200, np.uint8)
    truth = np.zeros((440, 440), np.uint8)
    predicted = truth.copy()
    predicted[100:200, 100:200] = 1
    picture = np.asarray(draw_panel(image, truth, predicted, THREE))
    left = panels.MARGIN + 440 + panels.GAP
    top = panels.HEADER + 440 + panels.GAP + 2 * panels.CAPTION
    differences = picture[top : top + 440, left : left + 440].astype(int)
    coloured = np.abs(differences[..., 0] - differences[..., 2]) > 20
    assert coloured[100:200, 100:200].all()
    assert coloured.sum() == 100 * 100


@pytest.mark.parametrize("size", [(64, 64), (3000, 2000), (300, 1400), (1, 1)])
def test_pictures_of_all_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    width, height = size
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    truth = rng.choice([0, 1, 2, 255], (height, width)).astype(np.uint8)
    unsure = np.zeros((height, width), np.float32)
    path = tmp_path / "new" / panels.panel_file("a/b" * 40)
    write_panel(path, image, truth, truth, THREE, uncertainty=unsure)
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        assert picture.width <= panels.WIDTH_PX + 2 * panels.MARGIN
    assert [p.name for p in (tmp_path / "new").iterdir()] == [path.name]


@pytest.mark.parametrize("width", [200, 1200])
def test_names_have_room_in_pictures_of_any_width(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, str] = {}
    shortened = panels.shortened

    def noted(draw: ImageDraw.ImageDraw, text: str, size: int, room: float) -> str:
        drawn[text] = shortened(draw, text, size, room)
        return drawn[text]

    monkeypatch.setattr(panels, "shortened", noted)
    truth = np.arange(width, dtype=np.uint8)[None].repeat(300, 0) % 3
    draw_panel(np.full((300, width, 3), 200, np.uint8), truth, np.roll(truth, 1, axis=1), THREE)
    for name in (*THREE.names, "One class for another", "Falsely marked"):
        assert drawn[name] == name


def test_an_image_without_labels_is_drawn() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    nothing = np.full((32, 32), 255, np.uint8)
    assert draw_panel(image, nothing, np.zeros_like(nothing), THREE).size[0] > 0


def test_bad_input_and_folders(tmp_path: Path) -> None:
    image, labels = np.zeros((8, 9, 3), np.uint8), np.zeros((8, 9), np.uint8)
    with pytest.raises(UsageError, match="differ in size"):
        write_panel(tmp_path / "a.png", image, labels, labels[:4], THREE)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        write_panel(tmp_path / "file" / "a.png", image, labels, labels, THREE)


def test_file_names_hold_any_name_and_stay_different() -> None:
    names = ["train_1", "a/b", "a_b", "a%2Fb", "..", "café", 'x<>:"|?*\\']
    files = [panels.panel_file(n) for n in names]
    assert files[0] == "train_1.png"
    assert len(set(files)) == len(names)
    assert [unquote(f.removesuffix(".png")) for f in files] == names
    assert not any(c in f for f in files for c in '/<>:"|?*\\')


@pytest.mark.parametrize(
    "name", ["Пациент_" * 30, "日本" * 40, "a/b" * 90, "line\nbreak", "bad\udcff"]
)
def test_images_of_any_name_are_drawn(name: str, tmp_path: Path) -> None:
    image, labels = np.zeros((8, 9, 3), np.uint8), np.zeros((8, 9), np.uint8)
    file = panels.panel_file(name)
    assert file != panels.panel_file(f"{name}x")
    write_panel(tmp_path / file, image, labels, labels, THREE)
    assert [p.name for p in tmp_path.iterdir()] == [file]


def test_real_image(shared_data: Path) -> None:
    if not (shared_data / "glas").is_dir():
        pytest.skip("no GlaS images")
    dataset = GlaS(shared_data / "glas", "train")
    item = dataset[0]
    picture = draw_panel(item.image, item.mask, np.roll(item.mask, 9, 0), dataset.classes)
    assert picture.width == pytest.approx(1600, abs=10)
    green = np.asarray(dataset.classes.items[1].colour)
    assert np.count_nonzero((np.asarray(picture) == green).all(-1)) > 2000  # borders
