"""Where crops of slides are drawn: by the area of the tissue, however thin; found once, if kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from scipy import ndimage

from wsiseg.errors import SlideError
from wsiseg.slides.slide import open_slide
from wsiseg.training import tile_places
from wsiseg.training.tile_places import Places, find_places, kept_places
from wsiseg.training.tile_slides import OpenSlides, SlideFile
from wsiseg.training.tiles import SourceConfig, divide, find_files

MPP = 2.0
Bool = npt.NDArray[np.bool_]


def slide(path: Path, tissue: Bool) -> Path:
    """A slide of `MPP` micrometres per pixel, stained where a mask says."""
    pixels = np.where(tissue[..., None], (160, 80, 160), (245, 245, 245)).astype(np.uint8)
    per_cm = (1e4 / MPP, 1e4 / MPP)
    with tifffile.TiffWriter(path) as file:
        for step in (1, 2):
            file.write(
                pixels[::step, ::step],
                tile=(64, 64),
                photometric="rgb",
                subifds=1 if step == 1 else 0,
                subfiletype=step - 1,
                resolution=per_cm,
                resolutionunit=3,
            )
    return path


def strips(width_um: float) -> Bool:
    """Strips as of needle biopsies, down a slide of 2.4 mm, each 300 um from the next."""
    x = np.arange(1200) * MPP
    return np.broadcast_to((x % 300 < width_um) & (x > 100), (1200, 1200)).copy()


def pieces() -> Bool:
    """Pieces of 120 um."""
    found = np.zeros((1200, 1200), bool)
    for y in range(37, 1100, 161):
        for x in range(20, 1100, 173):
            found[y : y + 60, x : x + 60] = True
    return found


def hits(path: Path, tissue: Bool, count: int = 1000) -> tuple[list[tuple[int, int]], float]:
    """Places that are drawn, as (x, y) in pixels, and the share of them in or beside tissue."""
    with open_slide(path) as opened:
        places = find_places(opened)
    rng = np.random.default_rng(0)
    drawn = [tuple(int(v) for v in places.draw(rng)) for _ in range(count)]
    near = [tissue[max(0, y - 15) : y + 16, max(0, x - 15) : x + 16].any() for x, y in drawn]
    return drawn, float(np.mean(near))  # type: ignore[return-value]


@pytest.mark.parametrize("made", [lambda: strips(100), lambda: strips(20), pieces])
def test_thin_and_small_tissue_is_sampled(tmp_path: Path, made: Callable[[], Bool]) -> None:
    tissue = made()
    drawn, near = hits(slide(tmp_path / "s.tiff", tissue), tissue)
    assert near > 0.95
    parts, count = ndimage.label(tissue)
    assert {int(parts[min(y, 1199), min(x, 1199)]) for x, y in drawn} == set(range(count + 1))


def test_thin_tissue_beside_a_large_piece_has_its_share(tmp_path: Path) -> None:
    tissue = strips(100)
    tissue[:, :600] = False
    tissue[100:500, 100:500] = True
    drawn, near = hits(slide(tmp_path / "s.tiff", tissue), tissue, 2000)
    thin = np.mean([x > 550 for x, _ in drawn])
    share = tissue[:, 550:].sum() / tissue.sum()
    assert near > 0.95
    assert abs(thin - share) < 0.12


def test_a_slide_smaller_than_a_square_and_one_of_glass(tmp_path: Path) -> None:
    whole = slide(tmp_path / "s.tiff", np.ones((20, 25), bool))
    with open_slide(whole) as opened:
        places = find_places(opened)
    assert places.shape == (2, 2)
    with (
        open_slide(slide(tmp_path / "g.tiff", np.zeros((300, 300), bool))) as glass,
        pytest.raises(SlideError, match=r"g\.tiff: no tissue found"),
    ):
        find_places(glass)


def test_squares_of_a_large_slide_take_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 x 25 mm, as the mask of 8 um per pixel that is found on 100,000 x 100,000 px."""

    class Fake:
        path, mpp = Path("s"), 0.25
        size = type("S", (), {"width": 100_000, "height": 100_000})

    mask = np.zeros((3125, 3125), bool)
    mask[:1600] = True
    found = type("T", (), {"mask": mask})
    monkeypatch.setattr(tile_places, "find_tissue", lambda *_: found)
    places = find_places(Fake())  # type: ignore[arg-type]
    assert places.shape == (782, 782)
    assert places.packed.nbytes < 80_000
    assert places.marks()[:400].all()
    assert not places.marks()[400:].any()

    mask[:] = False
    mask[1::2, 1::2] = True  # crumbs, of which no square is half full
    assert find_places(Fake()).marks().mean() > 0.99  # type: ignore[arg-type]


def square() -> Places:
    marks = np.arange(12).reshape(3, 4) % 5 == 1
    return Places(np.packbits(marks), (3, 4), (32.0, 31.5))


def same(one: Places, other: Places) -> bool:
    return one[1:] == other[1:] and np.array_equal(one.marks(), other.marks())


class Finder:
    """Counts how often places are found."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Places:
        self.count += 1
        return square()


def test_what_was_found_is_kept_until_the_slide_changes(tmp_path: Path) -> None:
    path, folder, find = tmp_path / "s.tiff", tmp_path / "kept", Finder()
    path.write_text("a slide")
    for _ in range(3):
        assert same(kept_places(folder, path, None, find), square())
    assert find.count == 1
    kept_places(folder, path, 0.5, find)  # at another resolution
    assert find.count == 2
    os.utime(path, (1, 1))
    kept_places(folder, path, None, find)
    assert find.count == 3
    path.write_text("another slide")
    os.utime(path, (1, 1))
    kept_places(folder, path, None, find)
    assert find.count == 4
    assert len(list(folder.iterdir())) == 2
    kept_places(None, path, None, find)
    assert find.count == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda _: "",
        lambda _: "[]",
        lambda _: "null",
        lambda _: '{"key": 1}',
        lambda t: t[: len(t) // 2],
        lambda t: t.replace('"shape": [3, 4]', '"shape": [300, 4]'),
        lambda t: t.replace('"shape": [3, 4]', '"shape": [-3, -4]'),
        lambda t: t.replace('"shape": [3, 4]', '"shape": 3'),
        lambda t: t.replace('"side": [32.0, 31.5]', '"side": [null, 1]'),
        lambda t: t.replace('"packed": "', '"packed": "?'),
        lambda t: t.replace('"key": [1', '"key": [0'),
        lambda _: "\x00\xff",
    ],
)
def test_what_is_kept_and_damaged_is_made_anew(
    tmp_path: Path, change: Callable[[str], str]
) -> None:
    path, folder, find = tmp_path / "s.tiff", tmp_path / "kept", Finder()
    path.write_text("a slide")
    kept_places(folder, path, None, find)
    (file,) = folder.iterdir()
    text = file.read_text()
    file.write_text(change(text), encoding="latin-1")
    assert file.read_bytes() != text.encode()
    assert same(kept_places(folder, path, None, find), square())
    assert find.count == 2
    assert file.read_text() == text


def test_many_may_keep_at_once_and_none_must(tmp_path: Path) -> None:
    path, find = tmp_path / "s.tiff", Finder()
    path.write_text("a slide")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: kept_places(tmp_path / "k", path, None, find), range(80)))
    assert all(same(m, square()) for m in made)
    (tmp_path / "file").write_text("no folder")
    assert same(kept_places(tmp_path / "file", path, None, find), square())


def test_files_are_searched_once_for_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide(tmp_path / "a.tiff", pieces())
    slide(tmp_path / "b.tiff", strips(100))
    searched: list[Any] = []
    plain = tile_places.find_tissue

    def find(opened: Any, mode: str) -> Any:
        searched.append(opened.path.name)
        return plain(opened, mode)

    monkeypatch.setattr(tile_places, "find_tissue", find)
    crops = []
    for _ in range(3):
        found = find_files([SourceConfig("*.tiff")], tmp_path, mpp=2.0, kept=tmp_path / "kept")
        pools = divide(found, validation_share=0.5)
        crops.append(pools.training.batch(32, 4, (0, 0), scale=(1, 1)))
        assert pools.held_out_images == 1
        pools.slides.close()
    assert sorted(searched) == ["a.tiff", "b.tiff"]
    assert np.array_equal(crops[0], crops[2])


def test_an_unreadable_slide_is_found_out_though_its_places_are_kept(tmp_path: Path) -> None:
    path, folder, slides = slide(tmp_path / "s.tiff", pieces()), tmp_path / "kept", OpenSlides()
    SlideFile(path, None, MPP, slides, folder)
    slides.close()
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(SlideError):
        SlideFile(path, None, MPP, slides, folder)


@pytest.mark.parametrize("offset", range(8))
def test_threads_beside_a_large_piece_are_sampled(tmp_path: Path, offset: int) -> None:
    """Wherever the borders of the squares lie."""
    tissue = np.zeros((600, 600), bool)
    tissue[100:400, 50:300] = True
    tissue[50:550, 450 + 2 * offset : 456 + 2 * offset] = True  # 12 um
    with open_slide(slide(tmp_path / "s.tiff", tissue)) as opened:
        marks = find_places(opened).marks()
    right = marks[:, marks.shape[1] * 7 // 10 :]
    assert right.any(axis=1).sum() > 0.7 * 500 / 600 * len(marks)
