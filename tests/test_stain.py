"""Stains and normalising: known mixtures, phantoms in two colourings, a slow second version."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsiseg.config import from_mapping, to_mapping
from wsiseg.errors import ConfigError, DatasetError
from wsiseg.slides import phantom_brush
from wsiseg.stain import (
    StainBasis,
    apply_matrix,
    estimate_stains,
    normalise_image,
    normalising_matrix,
    read_basis,
    stained,
    target_of,
    thinned,
)

HE = np.array([(0.62, 0.72, 0.31), (0.08, 0.92, 0.38)])
OTHER = np.array([(0.48, 0.84, 0.25), (0.14, 0.90, 0.41)])


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def mixture(
    vectors: np.ndarray = HE, *, count: int = 40_000, strength: float = 1.0, seed: int = 0
) -> np.ndarray:
    """Pixels (N, 3) of nuclei, stroma and what is between, with noise, and as much glass."""
    rng = np.random.default_rng(seed)
    share = rng.beta(0.6, 0.6, count)
    amount = strength * rng.uniform(0.4, 1.8, count)
    density = (amount * share)[:, None] * unit(vectors)[0]
    density = density + (amount * (1 - share) * 0.7)[:, None] * unit(vectors)[1]
    light = 256 * np.exp(-density) - 1 + rng.normal(0, 1.0, (count, 3))
    glass = rng.normal(246, 2, (count, 3))
    return np.concatenate([light, glass]).clip(0, 255).round().astype(np.uint8)


def angles(basis: StainBasis, vectors: np.ndarray) -> np.ndarray:
    cosines = (np.array(basis.vectors) * unit(vectors)).sum(1)
    return np.degrees(np.arccos(cosines.clip(-1, 1)))


def known(vectors: np.ndarray, maxima: tuple[float, float] = (1.5, 1.0)) -> StainBasis:
    return from_mapping(StainBasis, {"vectors": unit(vectors).tolist(), "maxima": [*maxima]})


@pytest.mark.parametrize("vectors", [HE, OTHER])
def test_known_stains_are_found_again(vectors: np.ndarray) -> None:
    basis = estimate_stains(mixture(vectors))
    assert basis is not None
    assert angles(basis, vectors).max() < 4
    assert basis.maxima == pytest.approx((1.75, 1.22), rel=0.1)
    shuffled = np.random.default_rng(1).permutation(mixture(vectors))
    assert estimate_stains(shuffled.reshape(200, 400, 3)) == basis


def test_ink_blood_black_and_glass_do_not_count() -> None:
    clean = mixture()
    alone = estimate_stains(clean)
    extra = np.array([(20, 140, 130), (160, 40, 20), (5, 5, 5), (130, 130, 130)], np.uint8)
    assert not stained(extra).any()
    assert not stained(np.full((3, 3), 250, np.uint8)).any()
    dirty = estimate_stains(np.concatenate([clean, np.repeat(extra, 8000, axis=0)]))
    assert dirty == alone


def test_one_prevailing_stain_still_gives_a_second_with_less_red() -> None:
    """Where noise outweighs the second stain, its direction is that of red, not of the noise."""
    rng = np.random.default_rng(3)
    share = rng.uniform(0.62, 1.0, 50_000)
    both = unit(HE)
    density = share[:, None] * both[0] + (1 - share)[:, None] * both[1]
    density[:, 2] += rng.normal(0, 0.06, len(density))
    basis = estimate_stains((256 * np.exp(-density) - 1).clip(0, 255).round().astype(np.uint8))
    assert basis is not None
    haematoxylin, eosin = basis.vectors
    assert haematoxylin[0] > eosin[0] + 0.08
    assert abs(haematoxylin[2] - eosin[2]) < 0.2


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((64, 64, 3), 245, np.uint8),
        np.empty((0, 3), np.uint8),
        mixture(count=300),
        np.tile(np.array([[150, 70, 150]], np.uint8), (5000, 1)),
        mixture()[:, [1, 0, 2]],
        mixture(np.array([(0.27, 0.57, 0.78), (0.65, 0.70, 0.29)])),
    ],
    ids=["glass", "nothing", "too little", "one colour", "green and red swapped", "brown"],
)
def test_stains_that_cannot_be_told(pixels: np.ndarray) -> None:
    assert estimate_stains(pixels) is None
    assert normalise_image(pixels, known(OTHER)) is pixels


def test_the_map_moves_stains_to_stains() -> None:
    source, target = known(HE, (1.2, 0.9)), known(OTHER, (1.8, 0.6))
    matrix = normalising_matrix(source, target)
    for k in range(2):
        moved = matrix @ np.array(source.vectors[k]) * source.maxima[k]
        assert moved == pytest.approx(np.array(target.vectors[k]) * target.maxima[k], abs=1e-4)
    assert normalising_matrix(source, source) == pytest.approx(np.eye(3), abs=1e-5)
    pale = known(HE, (1e-3, 1e-3))
    gained = normalising_matrix(pale, known(HE, (2.0, 2.0))) @ np.array(pale.vectors[0])
    assert np.linalg.norm(gained) == pytest.approx(3, abs=1e-3), "a pale slide is no noise"


def test_applying_is_that_of_a_slow_version_for_every_kind_of_pixel() -> None:
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    image = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
    matrix = normalising_matrix(known(HE), known(OTHER, (2.0, 0.8)))
    density = -np.log((image.astype(np.float64) + 1) / 256)
    slow = (256 * np.exp(-(density @ matrix.T)) - 1).clip(0, 255)
    fast = apply_matrix(image, matrix)
    assert fast.shape == image.shape
    assert fast.dtype == np.uint8
    assert np.abs(fast.astype(float) - slow).max() <= 0.5 + 1e-6
    assert (fast[image.min(-1) == 255] == 255).all()
    assert (apply_matrix(image, np.eye(3)) == image).all()


def test_a_pixel_does_not_depend_on_its_tile() -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 301, 3), np.uint8)
    matrix = normalising_matrix(known(HE), known(OTHER))
    whole = apply_matrix(image, matrix)
    for rows, columns in ((slice(0, 7), slice(3, 4)), (slice(100, 299), slice(50, 300))):
        assert (apply_matrix(image[rows, columns], matrix) == whole[rows, columns]).all()


def painted(monkeypatch: pytest.MonkeyPatch, vectors: np.ndarray, strength: float) -> np.ndarray:
    """One phantom, developed with given stains."""
    rng = np.random.default_rng(5)
    yy, xx = np.mgrid[:256, :256]
    labels = np.full((256, 256), phantom_brush.STROMA, np.uint8)
    for y, x in ((70, 60), (180, 150), (60, 190)):
        labels[(yy - y) ** 2 + (xx - x) ** 2 < 45**2] = phantom_brush.GLAND
    haematoxylin, eosin = (unit(vectors) * strength * [[1.9], [0.9]]).astype(np.float32)
    monkeypatch.setattr(phantom_brush, "_HAEMATOXYLIN", haematoxylin)
    monkeypatch.setattr(phantom_brush, "_EOSIN", eosin)
    return phantom_brush.paint(labels, mpp=0.5, rng=rng)


def test_two_colourings_of_one_phantom_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = painted(monkeypatch, HE, 1.0), painted(monkeypatch, OTHER, 0.65)
    target = target_of([one])
    apart = np.abs(one.astype(int) - other).mean()
    near = np.abs(one.astype(int) - normalise_image(other, target)).mean()
    assert apart > 12
    assert near < apart / 3
    own = np.abs(one.astype(int) - normalise_image(one, target))
    assert own.max() <= 1, "its own target changes nothing"


def test_the_target_is_the_median_of_those_that_can_be_told() -> None:
    images = [mixture(HE, strength=s, seed=k) for k, s in enumerate((0.9, 1.0, 1.6))]
    found = target_of([*images, np.full((9, 9, 3), 250, np.uint8)])
    middle = estimate_stains(images[1])
    assert middle is not None
    assert found.maxima == pytest.approx(middle.maxima, rel=0.03)
    assert np.linalg.norm(found.vectors, axis=1) == pytest.approx(1, abs=1e-5)
    with pytest.raises(DatasetError, match="no image has enough stained tissue"):
        target_of([np.full((9, 9, 3), 250, np.uint8)])


def test_thinning_is_even_and_fixed() -> None:
    pixels = np.arange(3000, dtype=np.uint16).reshape(1000, 3).astype(np.uint8)
    assert thinned(pixels, 1000) is pixels
    few = thinned(np.arange(1000)[:, None].repeat(3, 1), 70)
    assert len(few) == 70
    assert set(np.diff(few[:, 0])) <= {14, 15}


def test_a_basis_goes_through_plain_data_and_is_checked() -> None:
    basis = known(HE)
    assert read_basis(to_mapping(basis)) == basis
    assert read_basis(basis) is basis
    assert read_basis(None) is None
    plain = to_mapping(basis)
    for change, message in (
        ({"vectors": [[1, 1, 0], [0, 1, 0]]}, "unit vectors"),
        ({"vectors": [[0, 1, 0], [0, 1, 0]]}, "differ in direction"),
        ({"vectors": [[0, float("nan"), 0], [0, 1, 0]]}, "nan is no number"),
        ({"maxima": [0.0, 1.0]}, "above 0"),
        ({"maxima": [1.0]}, r"stain_target\.maxima"),
        ({"colour": 1}, r"unknown key stain_target\.colour"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_basis({**plain, **change})


def test_real_images_come_together(shared_data: Path) -> None:
    """Two GlaS images of unlike colour: the stains of one become those of the other."""
    images = [
        np.asarray(Image.open(shared_data / "glas" / f"{n}.png").convert("RGB"))
        for n in ("train_1", "testA_3")
    ]
    target = target_of(images[:1])
    before, after = estimate_stains(images[1]), estimate_stains(normalise_image(images[1], target))
    assert before is not None
    assert after is not None
    vectors = np.array(target.vectors)
    assert angles(after, vectors).max() < 4
    assert angles(before, vectors).max() > 5
    assert after.maxima == pytest.approx(target.maxima, rel=0.2)
    assert before.maxima != pytest.approx(target.maxima, rel=0.4)
