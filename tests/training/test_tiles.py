"""Unlabelled tissue: which files are read, at which resolution, in which order, what is held."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsiseg.errors import ConfigError, DatasetError, WsisegError
from wsiseg.geometry import Box, Size
from wsiseg.slides.phantom import write_phantom
from wsiseg.slides.slide import Slide, open_slide
from wsiseg.training.tile_files import ImageCache, is_slide
from wsiseg.training.tile_slides import OpenSlides, SlideFile
from wsiseg.training.tiles import Pools, SourceConfig, TilePool, load_pools

SAME = (1.0, 1.0)


def paint(path: Path, value: int, size: tuple[int, int] = (60, 40)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, value in (("train_1", 10), ("train_2", 20), ("testA_1", 99), ("testB_1", 98)):
        paint(tmp_path / f"{name}.png", value)
        paint(tmp_path / f"{name}_anno.png", 77)
    return tmp_path


def load(root: Path, *sources: SourceConfig, **options: Any) -> Pools:
    return load_pools(sources, root, **{"mpp": 1.0, **options})


def colours(pool: TilePool) -> set[int]:
    return {int(f.view(8)[0, 0, 0]) for g in pool.groups for f in g}


def names(pool: TilePool | None) -> set[str]:
    return {f.path.name for g in pool.groups for f in g} if pool else set()


def test_test_images_and_annotations_stay_out(folder: Path) -> None:
    source = SourceConfig("train_*.png", exclude="*_anno.png")
    pools = load(folder, source)
    assert colours(pools.training) == {10, 20}
    assert pools.held_out is None
    assert pools.measured is pools.training


def test_images_are_brought_to_the_resolution(tmp_path: Path) -> None:
    ramp = np.arange(64, dtype=np.uint8).repeat(2)[None, :, None]  # each value twice along x
    Image.fromarray(np.broadcast_to(ramp, (40, 128, 3)).copy()).save(tmp_path / "a.png")
    known = load(tmp_path, SourceConfig("a.png", mpp=0.5)).training.groups[0][0]
    assert np.array_equal(known.view(16)[3, :, 0], np.arange(24, 40))
    unknown = load(tmp_path, SourceConfig("a.png")).training.groups[0][0]
    assert np.array_equal(unknown.view(16)[3, :, 0], np.arange(28, 36).repeat(2))


def test_crops_depend_on_their_numbers_alone(folder: Path) -> None:
    sources = [SourceConfig("train_1.png", weight=3.0), SourceConfig("train_2.png")]
    pool = load(folder, *sources).training
    before = threading.active_count()
    first = pool.batches(8, 50, seed=4, start=0, scale=SAME)
    third = [next(first) for _ in range(3)][2]
    later = pool.batches(8, 50, seed=4, start=2, scale=SAME)
    assert np.array_equal(next(later), third)
    shares = [pool.batches(8, 50, seed=4, start=2, scale=SAME, share=(i, 2)) for i in range(2)]
    for index, batches in enumerate(shares):
        assert np.array_equal(next(batches), third[index::2])
    share = np.mean([float((next(later) == 10).mean()) for _ in range(10)])
    assert 0.68 < share < 0.82
    for batches in (first, later, *shares):
        batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_error_in_the_thread_reaches_the_reader(folder: Path) -> None:
    pool = TilePool([[]], [1.0])
    with pytest.raises(ValueError, match="high <= 0"):
        next(pool.batches(8, 2, seed=0, start=0, scale=SAME))


def test_copies_are_held_out_together(tmp_path: Path) -> None:
    for group in range(10):
        for copy in range(3):
            paint(tmp_path / "colon" / f"g{group:04d}_{copy}.png", 10 * group)
    for number in range(4):
        paint(tmp_path / f"single_{number}.png", 200 + number)
    paint(tmp_path / "alone.png", 250)
    sources = (
        SourceConfig("colon/*.png", group="(g[0-9]+)_", label="colon"),
        SourceConfig("single_*.png", weight=2.0),
        SourceConfig("alone.png"),
        SourceConfig("colon/g000[0-4]*.png"),  # names files of the first again
    )
    pools = load(tmp_path, *sources, validation_share=0.25, seed=3)
    assert pools.held_out is not None
    held, kept = names(pools.held_out), names(pools.training)
    groups = {n[:5] for n in held if n.startswith("g")}
    assert len(groups) == 3  # a quarter of ten, rounded up
    assert groups.isdisjoint(n[:5] for n in kept)
    assert sum(n.startswith("g") for n in held) == 9
    assert sum(n.startswith("single") for n in held) == 1
    assert "alone.png" in kept
    assert held.isdisjoint(kept)
    assert pools.training.labels == ("colon", "", "", "")
    again = load(tmp_path, *sources, validation_share=0.25, seed=3)
    assert names(again.held_out) == held
    others = {
        frozenset(names(load(tmp_path, *sources, validation_share=0.25, seed=s).held_out))
        for s in range(4)
    }
    assert len(others) > 1
    most = load(tmp_path, sources[1], validation_share=0.99)
    assert len(most.training) == most.held_out_images == 2


def test_a_patient_is_on_one_side_in_all_sources(tmp_path: Path) -> None:
    for patient in range(12):
        paint(tmp_path / "normal" / f"p{patient:02d}_n.png", 10)
        if patient % 3:  # other patients, so that each source by itself would draw others
            paint(tmp_path / "tumour" / f"p{patient:02d}_t.png", 20)
    sources = [
        SourceConfig(f"{kind}/*.png", group="^(p[0-9]+)_", label=kind)
        for kind in ("normal", "tumour")
    ]
    for seed in range(5):
        pools = load(tmp_path, *sources, validation_share=0.3, seed=seed)
        held, kept = ({n[:3] for n in names(p)} for p in (pools.held_out, pools.training))
        assert held
        assert held.isdisjoint(kept)


def test_a_patient_is_on_one_side_whichever_source_comes_first(tmp_path: Path) -> None:
    for patient in range(6):
        for number in range(4):
            paint(tmp_path / f"p{patient}_{number}.png", 10)
    plain, grouped = SourceConfig("*_[01].png"), SourceConfig("*.png", group="^(p[0-9])_")
    for seed in range(3):
        pools = load(tmp_path, plain, grouped, validation_share=0.3, seed=seed)
        held, kept = ({n[:2] for n in names(p)} for p in (pools.held_out, pools.training))
        assert len(held) == 2
        assert held.isdisjoint(kept)
        assert pools.training.sources == ("*_[01].png", "*.png")
        other = load(tmp_path, grouped, plain, validation_share=0.3, seed=seed)
        assert names(other.held_out) == names(pools.held_out)


def test_files_without_a_group_are_warned_of(tmp_path: Path) -> None:
    for name in ("g1_a", "g2_a", "colonn7"):
        paint(tmp_path / f"{name}.png", 10)
    with pytest.warns(UserWarning, match=r"finds nothing in 1 of 3 names, such as colonn7\.png"):
        load(tmp_path, SourceConfig("*.png", group="(g[0-9]+)_"), validation_share=0.3)


def test_some_files_are_evenly_spread(tmp_path: Path) -> None:
    for number in range(10):
        paint(tmp_path / f"a_{number}.png", number)
    paint(tmp_path / "b.png", 100)
    sources = (SourceConfig("a_*.png", label="x"), SourceConfig("b.png"))
    chosen = load(tmp_path, *sources).training.views(6)
    assert [v.file.path.name for v in chosen] == ["a_0.png", "a_3.png", "a_6.png", "b.png"]
    assert [v.label for v in chosen] == ["x", "x", "x", ""]


def test_decoded_images_are_bounded(folder: Path) -> None:
    cache = ImageCache(20_000)  # two of 60 x 40 x 4 bytes
    first = cache.get(folder / "train_1.png", 1.0)
    assert cache.get(folder / "train_1.png", 1.0) is first
    for name in ("train_2", "train_1", "testA_1"):
        cache.get(folder / f"{name}.png", 1.0)
    assert cache.held_bytes == 19_200
    assert cache.get(folder / "train_1.png", 1.0) is first  # train_2 was used longest ago
    tight = ImageCache(1)
    for name in ("train_1", "train_2"):
        assert tight.get(folder / f"{name}.png", 1.0).size == (60, 40)
        assert tight.held_bytes == 9_600


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("slides")
    for seed in (1, 2):
        write_phantom(made / f"s{seed}.tiff", Size(2048, 1536), mpp=0.5, seed=seed)
    return made


def test_tissue_windows_come_from_the_slide(slides: Path) -> None:
    pools = load(slides, SourceConfig("*.tiff"))
    pool = pools.training
    assert len(pool) == 2
    file = pool.groups[0][0]
    assert isinstance(file, SlideFile)
    with open_slide(slides / "s1.tiff") as slide:
        grid = slide.grid(1.0)
        whole = slide.read(grid.box, grid)
    rng = np.random.default_rng(0)
    stained = []
    for x, y in ((int(v) for v in file.places.draw(rng)) for _ in range(200)):
        part = whole[max(0, y // 2 - 32) : y // 2 + 32, max(0, x // 2 - 32) : x // 2 + 32]
        stained.append((part.min(axis=2) < 225).mean())
    assert np.quantile(stained, 0.05) > 0.1  # at the edge of the tissue
    assert np.mean(stained) > 0.6
    middle = file.places.draw(None)
    left = min(max(middle[0] / 2 - 32, 0), grid.size.width - 64)
    top = min(max(middle[1] / 2 - 32, 0), grid.size.height - 64)
    box = Box(int(left), int(top), 64, 64)
    assert np.array_equal(file.view(64), whole[box.slices])
    batch = pool.batch(64, 6, (0, 0), scale=(0.75, 1.33))
    assert batch.shape == (6, 64, 64, 3)
    assert min(crop.std() for crop in batch) > 5
    assert np.array_equal(batch, pool.batch(64, 6, (0, 0), scale=(0.75, 1.33)))
    pools.slides.close()


def test_a_bounded_number_of_slides_is_open(slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still: set[Path] = set()
    close = Slide.close

    def opened(path: Path, *, mpp: float | None) -> Any:
        still.add(path)
        return open_slide(path, mpp=mpp)

    def closed(slide: Any) -> None:
        still.discard(slide.path)
        close(slide)

    monkeypatch.setattr("wsiseg.training.tile_slides.open_slide", opened)
    monkeypatch.setattr("wsiseg.slides.slide.Slide.close", closed)
    shelf, one, two = OpenSlides(limit=1), slides / "s1.tiff", slides / "s2.tiff"
    with shelf.use(one, None) as a:
        with shelf.use(two, None), shelf.use(one, None) as b:
            assert a is b
            assert still == {one, two}  # both in use
        assert still == {one}
        assert a.thumbnail(16).shape[2] == 3
    with shelf.use(two, None):
        pass
    assert still == {two}
    shelf.close()
    assert not still


def test_what_a_slide_is(slides: Path, tmp_path: Path) -> None:
    import tifffile

    pixels = np.full((96, 96, 3), 180, np.uint8)
    tifffile.imwrite(tmp_path / "plain.tif", pixels)
    tifffile.imwrite(tmp_path / "tiled.tif", pixels, tile=(32, 32))
    large = np.full((32, 4112, 3), 180, np.uint8)
    tifffile.imwrite(tmp_path / "wide.tif", large, tile=(32, 32))
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as file:
        file.write(pixels, tile=(32, 32), subifds=1)
        file.write(pixels[::2, ::2], tile=(32, 32), subfiletype=1)
    paint(tmp_path / "picture.png", 9)
    found = {p.name for p in tmp_path.iterdir() if is_slide(p)}
    assert found == {"wide.tif", "pyramid.tif"}
    assert is_slide(slides / "s1.tiff")
    pool = load(tmp_path, SourceConfig("tiled.tif")).training
    assert (pool.groups[0][0].view(8) == 180).all()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such images; check the data folder"):
        load(tmp_path, SourceConfig("*.png"))
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DatasetError, match=r"a\.png: not a readable image"):
        load(tmp_path, SourceConfig("*.png"))
    (tmp_path / "a.txt").write_text("no slide")
    with pytest.raises(WsisegError, match=r"a\.txt: not a slide or image"):
        load(tmp_path, SourceConfig("*.txt"))
    with pytest.raises(ConfigError, match="group is not a regular expression"):
        SourceConfig("*.png", group="(")
    paint(tmp_path / "glass.png", 245, (900, 900))
    import tifffile

    glass = np.full((600, 600, 3), 245, np.uint8)
    with tifffile.TiffWriter(tmp_path / "glass.tif") as file:
        file.write(glass, tile=(64, 64), subifds=1)
        file.write(glass[::2, ::2], tile=(64, 64), subfiletype=1)
    with pytest.raises(DatasetError, match=r"glass\.tif: no tissue found"):
        load(tmp_path, SourceConfig("*.tif", mpp=0.5))
