"""Frames, grids and reading of slides."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from wsiseg.errors import ResolutionError, UsageError
from wsiseg.geometry import Box, Grid, Size
from wsiseg.slides import Slide, open_slide
from wsiseg.slides.resolution import Resolution
from wsiseg.slides.slide import _level_ratio


class FakeBackend:
    """Two levels of a random picture; level 1 is the mean of 2 x 2 pixels."""

    name = "openslide"
    vendor = "mirax"
    associated: dict[str, Size] = {}  # noqa: RUF012

    def __init__(self, bounds: Box | None = None) -> None:
        rng = np.random.default_rng(0)
        level0 = rng.integers(0, 256, (120, 200, 3)).astype(np.uint8)
        level1 = level0.reshape(60, 2, 100, 2, 3).mean((1, 3)).round().astype(np.uint8)
        self.levels = [level0, level1]
        self.level_sizes = (Size(200, 120), Size(100, 60))
        self.level_downsamples = (1.0, 2.0)
        self.properties = {"openslide.quickhash-1": "abc"}
        for name, value in zip(("x", "y", "width", "height"), bounds or (), strict=False):
            self.properties[f"openslide.bounds-{name}"] = str(value)

    def read_level(self, level: int, box: Box) -> np.ndarray:
        assert Box(0, 0, *self.level_sizes[level]).intersection(box) == box
        return self.levels[level][box.slices]

    def close(self) -> None:
        pass


def fake_slide(bounds: Box | None = None, crop: bool = True) -> tuple[Slide, FakeBackend]:
    backend = FakeBackend(bounds)
    resolution = Resolution(0.5, "option")
    return Slide(Path("x"), backend, resolution=resolution, crop_to_bounds=crop), backend


def test_facts_of_a_phantom(phantom: Path) -> None:
    with open_slide(phantom) as slide:
        assert (slide.backend, slide.vendor, slide.size) == (
            "direct",
            "generic-tiff",
            (1101, 743),
        )
        assert (slide.mpp, slide.mpp_source) == (pytest.approx(0.5, rel=1e-6), "tiff resolution")
        assert slide.level_sizes == ((1101, 743), (551, 372), (276, 186))
        assert slide.bounds is None
        assert slide.objective_power is None
        assert len(slide.quickhash) == 64
    with open_slide(phantom, mpp=0.25) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.25, "option")


def test_level_0_is_what_openslide_reads(phantom: Path) -> None:
    with open_slide(phantom) as slide, openslide.OpenSlide(phantom) as plain:
        grid = slide.grid(slide.mpp)
        expected = np.asarray(plain.read_region((100, 50), 0, (300, 200)))[..., :3]
        assert np.array_equal(slide.read(Box(100, 50, 300, 200), grid), expected)


@pytest.mark.parametrize("backend", ["openslide", "tiffslide"])
@pytest.mark.parametrize("mpp", [0.4, 0.5, 0.62, 1.0, 1.37, 2.9])
def test_reading_does_not_depend_on_the_split(phantom: Path, backend: str, mpp: float) -> None:
    with open_slide(phantom, backend=backend) as slide:
        grid = slide.grid(mpp)
        whole = slide.read(Box(-3, -5, grid.size.width + 10, grid.size.height + 9), grid)
        for box in (
            Box(-3, -5, 20, 30),
            Box(17, 31, 61, 45),
            Box(101, 64, 33, 1),
            Box(90, 3, 1, 77),
        ):
            part = slide.read(box, grid)
            at = Box(box.x + 3, box.y + 5, box.width, box.height)
            assert np.array_equal(part, whole[at.slices])


def test_both_backends_agree(phantom: Path) -> None:
    with open_slide(phantom) as a, open_slide(phantom, backend="tiffslide") as b:
        for mpp in (0.5, 0.8):
            grid = a.grid(mpp)
            assert np.array_equal(a.read(grid.box, grid), b.read(grid.box, b.grid(mpp)))


def test_a_coarse_read_lies_where_level_0_lies(phantom: Path) -> None:
    """Level 1 shows the means of level 0, without a shift, up to the last columns."""
    with open_slide(phantom) as slide:
        grid, fine = slide.grid(1.1), slide.grid(slide.mpp)
        assert slide.best_level(grid) == 1
        level0 = slide.read(fine.box, fine)
        coarse = slide.read(grid.box, grid).astype(float)
    expected = np.asarray(Image.fromarray(level0).resize(grid.size, Image.Resampling.BOX))
    for columns in (slice(200, 290), slice(-100, -10)):
        here = np.abs(coarse[:, columns] - expected[:, columns]).mean()
        sides = [np.roll(expected, s, 1)[:, columns] for s in (-1, 1)]
        assert here < min(np.abs(coarse[:, columns] - side).mean() for side in sides) / 2
        right = np.abs(coarse[:, columns] - sides[0]).mean()
        left = np.abs(coarse[:, columns] - sides[1]).mean()
        assert abs(right - left) < 0.25 * (right + left)


@pytest.mark.parametrize(
    ("level0", "level", "ratio"),
    [
        ((46003, 32914), (11500, 8228), (4, 4)),
        ((1101, 743), (551, 372), (2, 2)),
        ((1000, 800), (300, 240), (10 / 3, 10 / 3)),
        ((1000, 800), (500, 300), (2, 8 / 3)),
    ],
)
def test_ratio_of_levels(
    level0: tuple[int, int], level: tuple[int, int], ratio: tuple[float, float]
) -> None:
    assert _level_ratio(Size(*level0), Size(*level)) == pytest.approx(ratio)


def test_outside_is_white() -> None:
    slide, backend = fake_slide()
    grid = slide.grid(0.5)
    image = slide.read(Box(-10, 110, 30, 20), grid)
    assert image.shape == (20, 30, 3)
    assert (image[:, :10] == 255).all()
    assert (image[10:] == 255).all()
    assert np.array_equal(image[:10, 10:], backend.levels[0][110:, :20])
    assert (slide.read(Box(500, 500, 4, 5), grid) == 255).all()
    assert slide.read(Box(0, 0, 0, 3), grid).shape == (3, 0, 3)


def test_best_level_is_the_coarsest_that_is_fine_enough() -> None:
    slide, _ = fake_slide()
    levels = [slide.best_level(slide.grid(mpp)) for mpp in (0.25, 0.5, 0.9, 1.0, 5.0)]
    assert levels == [0, 0, 0, 1, 1]
    near = Grid(Size(2000, 2000), 0.5, 0.995, Size(1006, 1006))
    assert slide.best_level(near) == 1


def test_bounds_crop_the_frame_as_qupath_does() -> None:
    bounds = Box(31, 20, 101, 60)
    slide, backend = fake_slide(bounds)
    assert (slide.bounds, slide.frame, slide.size) == (bounds, "qupath", (101, 60))
    grid = slide.grid(0.5)
    inside = slide.read(grid.box, grid)
    assert np.array_equal(inside, backend.levels[0][20:80, 31:132])
    assert (slide.read(Box(-5, 0, 5, 5), grid) == 255).all()
    coarse = slide.grid(2.0)
    level1 = backend.levels[1].astype(float)
    x0, x1 = (31 + 101 / 25 * 3) / 2, (31 + 101 / 25 * 4) / 2
    weights = np.clip(np.minimum(np.arange(100) + 1, x1) - np.maximum(np.arange(100), x0), 0, 1)
    expected = (level1[10:12] * weights[None, :, None]).sum((0, 1)) / weights.sum() / 2
    assert np.abs(slide.read(Box(3, 0, 1, 1), coarse)[0, 0] - expected).max() <= 0.51


def test_bounds_can_be_left_alone_and_must_be_complete() -> None:
    bounds = Box(31, 20, 101, 60)
    slide, _ = fake_slide(bounds, crop=False)
    assert (slide.bounds, slide.frame, slide.size) == (bounds, "openslide", (200, 120))
    backend = FakeBackend(bounds)
    del backend.properties["openslide.bounds-width"]
    part = Slide(Path("x"), backend, resolution=Resolution(0.5, "option"), crop_to_bounds=True)
    assert (part.bounds, part.size) == (None, (200, 120))


def test_thumbnail_keeps_the_aspect(phantom: Path) -> None:
    with open_slide(phantom) as slide:
        image = slide.thumbnail(200)
        assert image.shape == (135, 200, 3)
        assert slide.thumbnail(9999).shape == (743, 1101, 3)
        with pytest.raises(UsageError):
            slide.thumbnail(0)


def test_threads_read_the_same(phantom: Path) -> None:
    with open_slide(phantom) as slide:
        grid = slide.grid(1.3)
        boxes = [Box(x, y, 70, 70) for x in range(0, 420, 60) for y in range(0, 280, 60)]
        alone = [slide.read(box, grid) for box in boxes]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda box: slide.read(box, grid), boxes))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_large_reads_are_made_in_parts(phantom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(phantom) as slide:
        grid = slide.grid(0.7)
        whole = slide.read(grid.box, grid)
        monkeypatch.setattr("wsiseg.slides.slide._SOURCE_PX", 100)
        assert np.array_equal(slide.read(grid.box, grid), whole)


def test_a_grid_of_another_slide_is_refused(phantom: Path) -> None:
    with open_slide(phantom) as slide, pytest.raises(UsageError, match="another slide"):
        slide.read(Box(0, 0, 1, 1), Grid.at_mpp(Size(10, 10), 0.5, 0.5))


def test_real_slide_without_mpp(shared_data: Path) -> None:
    path = shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"
    with pytest.raises(ResolutionError, match="--mpp"):
        open_slide(path)
    with open_slide(path, mpp=0.5) as slide:
        assert (slide.vendor, slide.size, slide.mpp_source) == ("aperio", (4443, 3567), "option")
        grid = slide.grid(1.37)
        assert slide.best_level(grid) == 1
        whole = slide.read(Box(200, 200, 500, 300), grid)
        assert np.array_equal(slide.read(Box(333, 251, 90, 90), grid), whole[51:141, 133:223])


def test_real_slide_states_its_mpp(shared_data: Path) -> None:
    with open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        assert (slide.mpp, slide.mpp_source, slide.objective_power) == (0.499, "properties", 20)
        assert slide.associated["label"] == (387, 463)
