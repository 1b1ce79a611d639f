"""Plain images from many threads: what holds for the whole process stays as it was."""

from __future__ import annotations

import struct
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsiseg.cli import show_warning
from wsiseg.slides.image_file import ImageFileError, open_image

THREADS = 8


def colour(path: Path) -> int:
    with open_image(path) as image:
        time.sleep(0.0005)  # others come in between
        return int(np.asarray(image).max())


def test_filters_and_limit_are_as_before_after_many_threads(tmp_path: Path) -> None:
    Image.new("L", (16, 16), 7).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
    filters, limit = list(warnings.filters), Image.MAX_IMAGE_PIXELS

    def work(number: int) -> int:
        if number % 5 == 0:
            with pytest.raises(ImageFileError), open_image(tmp_path / "b.png"):
                pass
        return colour(tmp_path / "a.png")

    with ThreadPoolExecutor(THREADS) as pool:
        assert set(pool.map(work, range(25 * THREADS))) == {7}
    assert list(warnings.filters) == filters
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_images_above_the_limit_of_pillow_are_read_by_many_threads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (64, 64), 7).save(tmp_path / name)
    Image.new("L", (8, 8), 9).save(tmp_path / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    paths = [tmp_path / name, tmp_path / "small.png"] * (10 * THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(colour, paths)) == [7, 9] * (10 * THREADS)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_the_limit_within_an_image_is_an_error_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ImageFileError, match="1000000 pixels"), open_image(tmp_path / "a.png") as a:
        a.crop((0, 0, 1000, 1000))


def test_only_warnings_of_pillow_are_silenced(tmp_path: Path) -> None:
    """Those of another thread are shown while a header is read, and not those of the header."""
    path = tmp_path / "a.tif"
    Image.new("L", (16, 16), 7).save(path)
    data = path.read_bytes()
    width = struct.pack("<HHI", 256, 4, 1)  # two widths are one too many
    assert width in data
    path.write_bytes(data.replace(width, struct.pack("<HHI", 256, 3, 2)))
    with pytest.warns(UserWarning, match="too many entries"), Image.open(path) as image:
        assert image.width == 16
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            colour(path)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        try:
            for _ in range(300):
                with pytest.raises(UserWarning, match="mine"):
                    warnings.warn("mine", stacklevel=1)
        finally:
            done.set()
        reading.result()


def test_what_pillow_warns_of_is_not_for_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    show_warning("odd", UserWarning, str(Path(Image.__file__)), 1)
    assert capsys.readouterr().err == ""
    show_warning("odd", UserWarning, "/somewhere/else.py", 1)
    assert "UserWarning: odd" in capsys.readouterr().err
