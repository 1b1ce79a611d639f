"""Slides and images that cannot be read, wholly or in places: what is learnt without them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from touching import stored

from wsiseg.datasets.augment import AugmentConfig
from wsiseg.errors import DatasetError, SlideReadError
from wsiseg.geometry import Size
from wsiseg.slides.phantom import write_phantom
from wsiseg.slides.slide import Slide
from wsiseg.training.background import Background, BackgroundConfig
from wsiseg.training.tile_slides import SlideFile
from wsiseg.training.tiles import Pools, SourceConfig, load_pools, other_files

SAME = (1.0, 1.0)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phantom") / "s.tiff"
    write_phantom(path, Size(2048, 1536), mpp=0.5, seed=1)
    return path


OPEN: list[Pools] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().slides.close()


def load(root: Path, *sources: SourceConfig, **options: Any) -> Pools:
    OPEN.append(load_pools(sources, root, **{"mpp": 0.5, **options}))
    return OPEN[-1]


def quietly(root: Path, *sources: SourceConfig, **options: Any) -> Pools:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(root, *sources, **options)


def pyramid(path: Path, colour: tuple[int, int, int], **tags: Any) -> None:
    """A small slide of one colour."""
    pixels = np.full((600, 600, 3), colour, np.uint8)
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, tile=(64, 64), subifds=1, photometric="rgb", **tags)
        file.write(pixels[::2, ::2], tile=(64, 64), subfiletype=1, photometric="rgb")


def damaged(phantom: Path, path: Path, every: int) -> Path:
    """The phantom with every so-manyth tile of its level 0 overwritten."""
    data = bytearray(phantom.read_bytes())
    with tifffile.TiffFile(phantom) as file:
        page = file.pages[0]
        for offset, length in list(zip(page.dataoffsets, page.databytecounts, strict=True))[
            ::every
        ]:
            data[offset : offset + length] = bytes(length)
    path.write_bytes(data)
    return path


def paint(path: Path, value: int) -> None:
    noise = np.random.default_rng(value).integers(value, value + 9, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(path)


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def names(pools: Pools) -> list[str]:
    return [f.path.name for group in pools.training.groups for f in group]


@pytest.fixture
def folder(phantom: Path, tmp_path: Path) -> Path:
    """Three good slides and five that are none."""
    for name in ("a", "e", "z"):
        (tmp_path / f"{name}.tiff").symlink_to(phantom)
    resolution: dict[str, Any] = {"resolution": (20000, 20000), "resolutionunit": 3}
    pyramid(tmp_path / "dark.tiff", (12, 11, 10), **resolution)
    pyramid(tmp_path / "glass.tiff", (245, 245, 245), **resolution)
    pyramid(tmp_path / "unknown.tiff", (160, 80, 160))
    (tmp_path / "text.tiff").write_text("no slide")
    damaged(phantom, tmp_path / "hollow.tiff", every=1)
    return tmp_path


def test_slides_that_cannot_be_used_are_left_out(folder: Path) -> None:
    source = SourceConfig("*.tiff", mpp=None)
    with pytest.warns(UserWarning, match="it is left out") as caught:
        pools = load(folder, source, SourceConfig("*.tiff", weight=2.0), validation_share=0.3)
    said = {str(w.message).split(".tiff: ")[0].split("/")[-1]: str(w.message) for w in caught}
    assert len(caught) == len(said) == 5
    for name, why in {
        "dark": "is dark all over (at most 12 of 255)",
        "glass": "no tissue found",
        "hollow": "cannot read level 0 at",
        "text": "not a slide or image",
        "unknown": "does not state its micrometres per pixel; set mpp of its source",
    }.items():
        assert why in said[name]
        assert "it is left out; exclude of source *.tiff silences this" in said[name]
        assert "--" not in said[name]
        assert "\n" not in said[name]
    again = quietly(folder, source, SourceConfig("*.tiff", weight=2.0), validation_share=0.3)
    assert pools.record(folder) == again.record(folder)
    assert pools.held_out_images == 2  # of three slides one, from either source
    kept = load(folder, SourceConfig("[aez].tiff"), validation_share=0.3)
    assert names(kept) == names(pools)[:2]  # divided as if the others were not there


def test_a_slide_without_resolution_is_used_with_that_of_its_source(folder: Path) -> None:
    with pytest.raises(DatasetError, match="micrometres per pixel; set mpp of its source"):
        load(folder, SourceConfig("unknown.tiff"))
    assert names(load(folder, SourceConfig("unknown.tiff", mpp=0.5))) == ["unknown.tiff"]


def test_no_file_of_a_source_can_be_used(folder: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"none of its 2 files can be used; .*dark\.tiff: is dark"
    ):
        load(folder, SourceConfig("[a-e].tiff"), SourceConfig("[dg]*[ks].tiff"))


def test_images_that_are_none_are_left_out(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 10)
    (tmp_path / "b.png").write_text("no image")
    with pytest.warns(UserWarning, match=r"b\.png: not a readable image .* exclude") as caught:
        pools = load(tmp_path, SourceConfig("*.png"))
    assert len(caught) == 1
    assert names(pools) == ["a.png"]


def test_what_differs_from_the_record_is_named(folder: Path) -> None:
    kept = load(folder, SourceConfig("[ae].tiff")).record(folder)
    more = load(folder, SourceConfig("[aez].tiff")).record(folder)
    assert other_files(kept, kept) == ""
    assert other_files(kept, more) == "without z.tiff; take it away, or"
    assert "with z.tiff, which is not there or cannot be used now" in other_files(more, kept)
    assert "another version" in other_files("damaged", "too")


def test_crops_of_a_damaged_slide_are_taken_elsewhere(phantom: Path, tmp_path: Path) -> None:
    damaged(phantom, tmp_path / "s.tiff", every=3)
    pool = load(tmp_path, SourceConfig("*.tiff")).training
    batches = pool.batches(48, 8, seed=5, start=0, scale=SAME)
    with pytest.warns(UserWarning, match=r"s\.tiff: cannot read level 0 .* exclude") as caught:
        made = [next(batches) for _ in range(5)]
    close(batches)
    assert len(caught) == 1
    resumed = load(tmp_path, SourceConfig("*.tiff")).training
    later = resumed.batches(48, 8, seed=5, start=3, scale=SAME)
    with pytest.warns(UserWarning, match="cannot read"):
        rest = [next(later) for _ in range(2)]
    close(later)
    assert np.array_equal(rest, made[3:])
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "s.tiff").symlink_to(phantom)
    whole = load(tmp_path, SourceConfig("whole/*.tiff")).training
    same = np.concatenate([whole.batch(48, 8, (5, n), scale=SAME) for n in range(5)])
    alike = (same == np.concatenate(made)).all(axis=(1, 2, 3))
    assert 0.3 < alike.mean() < 1  # only what lies on damage is drawn elsewhere


def close(batches: Iterator[Any]) -> None:
    batches.close()  # type: ignore[attr-defined]


def test_damage_everywhere_ends_with_the_name_of_the_file(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.tiff").symlink_to(phantom)
    pool = load(tmp_path, SourceConfig("*.tiff")).training

    def read(slide: Slide, box: Any, grid: Any) -> Any:
        raise SlideReadError(f"{slide.path}: cannot read")

    monkeypatch.setattr(Slide, "read", read)
    for ask in (
        lambda: pool.batch(16, 1, (0, 0), scale=SAME),
        lambda: list(pool.read(pool.views(5), 16, 2)),
    ):
        with (
            warnings.catch_warnings(action="ignore"),
            pytest.raises(SlideReadError, match=r"s\.tiff: cannot read; .*exclude of its source"),
        ):
            ask()


def test_a_moment_of_refusal_changes_no_crop(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.tiff").symlink_to(phantom)
    pool = load(tmp_path, SourceConfig("*.tiff")).training
    expected = pool.batch(16, 4, (0, 0), scale=SAME)
    plain, calls = Slide.read, []

    def read(slide: Slide, box: Any, grid: Any) -> Any:
        calls.append(box)
        if len(calls) % 2:
            raise SlideReadError("another thread met damage")
        return plain(slide, box, grid)

    monkeypatch.setattr(Slide, "read", read)
    assert np.array_equal(pool.batch(16, 4, (0, 0), scale=SAME), expected)


def test_images_that_end_early_are_passed_over(tmp_path: Path) -> None:
    for number in range(4):
        paint(tmp_path / f"{number}.png", 40 * number)
    cut(tmp_path / "2.png")
    pool = load(tmp_path, SourceConfig("*.png")).training
    assert len(pool) == 4  # its header is there
    with pytest.warns(UserWarning, match=r"2\.png: not a readable image") as caught:
        batch = pool.batch(8, 60, (0, 0), scale=SAME)
    assert len(caught) == 1
    seen = [v.file.path.name for views, _ in pool.read(pool.views(9), 8, 2) for v in views]
    assert set(np.unique(batch // 40)) == {0, 1, 3}
    assert seen == ["0.png", "1.png", "3.png"]


def test_background_goes_on_without_bad_slides(folder: Path, tmp_path: Path) -> None:
    config = BackgroundConfig((SourceConfig("../*.tiff"),), share=0.5)
    root = tmp_path / "labelled"
    root.mkdir()
    with pytest.warns(UserWarning, match="it is left out"):
        background = Background.load(config, stored(root), mpp=0.5)
    assert background is not None
    assert [Path(n).name for n in background.names] == ["a.tiff", "e.tiff", "z.tiff"]
    image, _ = background.patch((32, 32), np.random.default_rng(0), AugmentConfig())
    background._pool.groups[0][0]._slides.close()  # type: ignore[union-attr]
    assert image.shape == (32, 32, 3)


def test_a_slide_has_as_many_views_as_are_asked_for(phantom: Path, tmp_path: Path) -> None:
    for name in ("s", "t"):
        (tmp_path / f"{name}.tiff").symlink_to(phantom)
    for number in range(3):
        paint(tmp_path / f"{number}.png", 40 * number)
    mixed = SourceConfig("[012s]*", label="x")
    pool = load(tmp_path, mixed, SourceConfig("[st].tiff"), SourceConfig("*.png")).training
    views = pool.views(60)
    counts = [sum(v.file is f for v in views[:20]) for f in pool.groups[0]]
    assert counts == [1, 1, 1, 17]
    assert [v.label for v in views[:20]] == ["x"] * 20
    assert [(v.file.path.name, v.number) for v in views[20:40]] == [
        (f"{name}.tiff", k) for name in "st" for k in range(10)
    ]
    assert len(views) == 43
    slide = pool.groups[1][0]
    assert isinstance(slide, SlideFile)
    crops = [slide.view(32, k) for k in range(10)]
    assert len({c.tobytes() for c in crops}) == 10
    again = load(tmp_path, SourceConfig("s.tiff")).training.groups[0][0]
    assert all(np.array_equal(again.view(32, k), c) for k, c in enumerate(crops))
    image = pool.groups[2][0]
    assert np.array_equal(image.view(16, 3), image.view(16))
    assert [len(v) for v, _ in pool.read(views, 16, 20)] == [20, 20, 3]
