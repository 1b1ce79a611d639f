"""Further images beside those of the data set: background, annotated ones, glass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from touching import Touching, config, grey_images, sequence, stored

from wsiseg.classes import IGNORE, Classes, TissueClass
from wsiseg.datasets.augment import AugmentConfig
from wsiseg.datasets.table import dataset_mapping, open_dataset
from wsiseg.errors import ConfigError, DatasetError
from wsiseg.training.background import AnnotatedConfig, Background, BackgroundConfig
from wsiseg.training.finish import card_of
from wsiseg.training.inputs import Inputs
from wsiseg.training.learnt import warn_of_learnt_validation, warn_of_training_images
from wsiseg.training.tiles import SourceConfig


def test_background_images_come_at_their_share(tmp_path: Path) -> None:
    grey_images(tmp_path / "grey")
    chosen = BackgroundConfig((SourceConfig("grey/*.png"),), share=0.3)
    background = Background.load(chosen, stored(tmp_path), mpp=1.0)
    patches = sequence(Touching(), background)
    batch = patches.batch(range(200))
    grey = (batch.images == 7).all(axis=(1, 2, 3))
    assert 0.2 < grey.mean() < 0.4
    assert (batch.masks[grey] == 0).all()
    assert not batch.borders[grey].any()
    assert np.array_equal(patches.batch([150]).images[0], batch.images[150])


def annotated_folder(folder: Path) -> str:
    """A data set of 40 x 40 px with stripes of three values, and its description."""
    for name in ("img", "mask"):
        (folder / name).mkdir(parents=True)
    stripes = np.repeat(np.array([0, 1, 2, 9], np.uint8), 10)[None].repeat(40, axis=0)
    Image.fromarray((stripes * 20 + 5)[..., None].repeat(3, 2)).save(folder / "img" / "a.png")
    Image.fromarray(stripes).save(folder / "mask" / "a.png")
    described = folder / "other.yaml"
    described.write_text(
        "name: folder\nimages: img/*.png\nmasks: mask/{stem}.png\nmpp: 1.0\nignore: [9]\nclasses:\n"
        + "".join(
            f"  - {{name: {n}, color: [{20 * v}, 0, 0], values: [{v}]}}\n"
            for v, n in enumerate(("Tumour", "Stroma", "Normal"))
        )
    )
    return str(described)


def test_annotated_images_are_background_where_they_say_so(tmp_path: Path) -> None:
    name = annotated_folder(tmp_path / "lung")
    grey_images(tmp_path / "grey")
    chosen = BackgroundConfig(
        (SourceConfig("grey/*.png"),),
        annotated=(AnnotatedConfig(name, "lung", ("Stroma", "Normal"), weight=3.0),),
        share=0.5,
    )
    background = Background.load(chosen, stored(tmp_path), mpp=1.0)
    assert background is not None
    assert background.names[-1] == "lung:a"
    patches = sequence(Touching(), background)
    batch = patches.batch(range(300))
    grey = (batch.images == 7).all(axis=(1, 2, 3))
    lung = (batch.images <= 185).all(axis=(1, 2, 3)) & ~grey
    lung &= ~(batch.masks == 1).any(axis=(1, 2))
    lung &= (batch.images != 60).any(axis=(1, 2, 3))
    assert 0.07 < grey.mean() < 0.19
    assert 0.28 < lung.mean() < 0.48
    values, masks = batch.images[lung][..., 0], batch.masks[lung]
    assert (masks[(values == 25) | (values == 45)] == 0).all()
    assert (masks[(values == 5) | (values == 185)] == IGNORE).all()
    assert not batch.borders[lung].any()
    assert np.array_equal(patches.batch([150]).images[0], batch.images[150])


def test_annotated_images_are_on_the_card(tmp_path: Path) -> None:
    name = annotated_folder(tmp_path / "lung")
    with (tmp_path / "lung" / "other.yaml").open("a") as file:
        file.write("terms: research only\nparts: [{name: test, measuring: true}, {name: train}]\n")
    data = stored(tmp_path)
    chosen = AnnotatedConfig(name, "lung", ("Stroma",))
    own = Background.load(BackgroundConfig(annotated=(chosen,)), data, mpp=1.0)
    inputs = Inputs(data, [0], [], np.zeros((0, 2), np.int64))
    card, licence = card_of(tmp_path / "m", config(), inputs, own, {"dataset": {}})
    assert licence == "research only"
    described = dataset_mapping(name)
    lung = open_dataset(described, tmp_path / "lung", "test")
    with pytest.warns(UserWarning, match="1 of the 1 images were in the model's training"):
        warn_of_training_images(card, described, lung, part="test")
    later = {"dataset": {}, "extractor": {"licence": licence, **card}}
    with pytest.warns(UserWarning, match="1 of the 1 validation images were in the training of"):
        warn_of_learnt_validation(later, Inputs(lung, [], [0], inputs.pixels).read(), [])
    with pytest.warns(UserWarning, match=r"1 of the 1 validation images are in background\.annot"):
        warn_of_learnt_validation({}, Inputs(lung, [], [0], inputs.pixels).read(), own.contents)
    measuring = BackgroundConfig(annotated=(replace(chosen, part="test"),))
    with pytest.warns(UserWarning, match=r"other\.yaml: test is for measuring"):
        Background.load(measuring, data, mpp=1.0)
    (tmp_path / "lung" / "mask" / "a.png").unlink()
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(tmp_path / "lung" / "mask" / "a.png")
    unlabelled = Background.load(BackgroundConfig(annotated=(chosen,)), data, mpp=1.0)
    assert unlabelled.contents == []  # nothing was learnt from it


def test_images_beside_a_data_set_that_is_a_link(tmp_path: Path) -> None:
    real, data = tmp_path / "real" / "glas", tmp_path / "data"
    for folder in (real, data):
        folder.mkdir(parents=True)
    (data / "glas").symlink_to(real)
    name = annotated_folder(data / "lung")
    grey_images(data / "grey")
    chosen = BackgroundConfig(
        (SourceConfig("../grey/*.png"),),
        annotated=(AnnotatedConfig(name, "../lung", ("Stroma",)),),
    )
    background = Background.load(chosen, stored(data / "glas"), mpp=1.0)
    assert background is not None
    assert background.names[-1] == "../lung:a"
    assert all(n.startswith("../grey/") for n in background.names[:-1])
    (data / "grey").rename(tmp_path / "real" / "grey")  # beside where the link leads
    (data / "lung").rename(tmp_path / "real" / "lung")
    again = AnnotatedConfig(str(tmp_path / "real/lung/other.yaml"), "../lung", ("Stroma",))
    chosen = BackgroundConfig(chosen.sources, (again,))
    found = Background.load(chosen, stored(data / "glas"), mpp=1.0)
    assert found is not None
    assert len(found.names) == len(background.names)


def test_annotated_images_say_what_is_an_object_but_not_where_it_ends(tmp_path: Path) -> None:
    name = annotated_folder(tmp_path / "lung")
    lung = AnnotatedConfig(name, "lung", ("Stroma",), {"Tumour": "b"})
    chosen = BackgroundConfig(annotated=(lung,), share=0.5)
    for borders in (True, False):
        background = Background.load(chosen, stored(tmp_path), mpp=1.0, borders=borders)
        patches = sequence(Touching(), background, border_px=3.0 if borders else 0.0)
        batch = patches.batch(range(60))
        theirs = (batch.images <= 45).any(axis=(1, 2, 3))
        assert 0.3 < theirs.mean() < 0.7
        values, masks = batch.images[theirs][..., 0], batch.masks[theirs]
        assert (masks[values == 5] == 1).all()
        assert (masks[values == 25] == 0).all()
        assert (masks[(values == 45) | (values == 185)] == IGNORE).all()
        assert np.array_equal(batch.undrawn[theirs], (masks == 1) & borders)
        assert not batch.undrawn[~theirs].any()
        assert not batch.borders[theirs].any()
        assert batch.borders[~theirs].any() == borders
        assert np.array_equal(batch.one(7).undrawn[0], batch.undrawn[7])


def test_annotated_images_alone_and_at_the_resolution_of_training(tmp_path: Path) -> None:
    name = annotated_folder(tmp_path / "lung")
    chosen = BackgroundConfig(annotated=(AnnotatedConfig(name, "lung", ("Tumour",)),), share=0.9)
    background = Background.load(chosen, stored(tmp_path), mpp=0.5)
    assert background is not None
    assert background.share == 0.9
    still = AugmentConfig(scale=(1.0, 1.0), rotate=False)
    image, mask = background.patch((80, 80), np.random.default_rng(1), still)
    assert sorted(np.bincount(mask.ravel(), minlength=256)[[0, IGNORE]]) == [1600, 4800]
    assert image.shape == (80, 80, 3)


def test_annotated_images_that_cannot_be(tmp_path: Path) -> None:
    name = annotated_folder(tmp_path / "lung")
    with pytest.raises(ConfigError, match="name its background classes"):
        AnnotatedConfig(name, "lung", ())
    with pytest.raises(ConfigError, match="'Stroma' is background and a class"):
        AnnotatedConfig(name, "lung", ("Stroma",), {"Stroma": "b"})
    with pytest.raises(ConfigError, match="weight"):
        AnnotatedConfig(name, "lung", ("Stroma",), weight=0)
    wanted = {"annotated": [{"dataset": name, "path": "lung", "background": ["Stroma"]}]}
    with pytest.raises(ConfigError, match="neither normalised nor stretched"):
        config(background=wanted, resize_px=64)
    chosen = BackgroundConfig(annotated=(AnnotatedConfig(name, "lung", ("Bone",)),))
    with pytest.raises(ConfigError, match="no class 'Bone'; there are Tumour, Stroma, Normal"):
        Background.load(chosen, stored(tmp_path), mpp=1.0)
    chosen = BackgroundConfig(annotated=(AnnotatedConfig(name, "lung", (), {"Tumour": "c"}),))
    with pytest.raises(ConfigError, match="no class 'c'; there are a, b"):
        Background.load(chosen, stored(tmp_path), mpp=1.0)
    chosen = BackgroundConfig(annotated=(AnnotatedConfig(name, "liver", ("Stroma",)),))
    with pytest.raises(DatasetError, match="liver"):
        Background.load(chosen, stored(tmp_path), mpp=1.0)


def test_glass_covers_a_part_and_is_background() -> None:
    background = Background.load(BackgroundConfig(glass=0.4), Touching(), mpp=1.0)
    bare, batch = (sequence(Touching(), b).batch(range(100)) for b in (None, background))
    changed = (batch.images != bare.images).any(axis=3)
    covered = changed.any(axis=(1, 2))
    assert 0.25 < covered.mean() < 0.55
    shares = changed[covered].mean(axis=(1, 2))
    assert 0 < shares.min() < 0.2 < 0.6 < shares.max() < 1
    white = changed & (batch.images.min(axis=3) > 210)
    assert white[covered].sum() > 0.9 * changed.sum()
    thick = white & (bare.images.max(axis=3) < 100)
    assert (batch.masks[thick] == 0).all()
    assert not batch.borders[thick].any()
    assert np.array_equal(batch.masks[~changed], bare.masks[~changed])


def test_what_is_off_draws_nothing() -> None:
    off = Background(None, [], BackgroundConfig(), label=0)
    bare, batch = (sequence(Touching(), b).batch(range(20)) for b in (None, off))
    assert np.array_equal(batch.images, bare.images)
    assert batch.places == bare.places


def test_a_share_of_glass_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"background\.glass 1"):
        BackgroundConfig(glass=1.0)


def test_background_without_a_background_class_is_refused(tmp_path: Path) -> None:
    data = stored(tmp_path)
    data.classes = Classes((TissueClass("a", (0, 0, 0)), TissueClass("b", (1, 1, 1))))
    chosen = BackgroundConfig((SourceConfig("*.png"),))
    with pytest.raises(ConfigError, match="background"):
        Background.load(chosen, data, mpp=1.0)
    with pytest.raises(ConfigError, match="background class"):
        Background.load(BackgroundConfig(glass=0.1), data, mpp=1.0)
    assert Background.load(BackgroundConfig(), data, mpp=1.0) is None
    with pytest.raises(ConfigError, match=r"background\.sources"):
        Background.load(chosen, Touching(), mpp=1.0)
