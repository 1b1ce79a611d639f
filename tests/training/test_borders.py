"""Borders of objects as targets, background images, averaged weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as nnf

from wsiseg.classes import IGNORE, Classes, TissueClass
from wsiseg.config import from_mapping
from wsiseg.datasets.augment import AugmentConfig
from wsiseg.datasets.base import LabelledDataset, LabelledImage
from wsiseg.errors import ConfigError, DatasetError
from wsiseg.models.checkpoint import load_model
from wsiseg.models.registry import build_extractor
from wsiseg.models.segmenter import Segmenter
from wsiseg.training.background import AnnotatedConfig, Background, BackgroundConfig
from wsiseg.training.head_task import HeadTask, Inputs
from wsiseg.training.losses import border_loss
from wsiseg.training.patches import ImageStore, Patches, border_band, to_resolution
from wsiseg.training.sliding import predict_image
from wsiseg.training.tiles import SourceConfig
from wsiseg.training.train import TrainConfig, train

CNN = {"name": "cnn", "channels": [8, 8, 8, 8], "tile_px": 32}
CLASSES = Classes((TissueClass("a", (0, 0, 0), background=True), TissueClass("b", (1, 1, 1))))


class Touching(LabelledDataset):
    """Images with two squares side by side, dark, and ignored pixels at the right edge."""

    classes = CLASSES
    mpp = 0.5
    names = groups = ("0", "1", "2", "3")
    with_instances = True

    def __getitem__(self, index: int) -> LabelledImage:
        instances = np.zeros((64, 96), np.int32)
        instances[16:48, 8:40], instances[16:48, 40:72] = 1, 5
        mask = (instances > 0).astype(np.uint8)
        mask[:, 90:] = IGNORE
        image = np.where(mask[..., None] == 1, 60, 220).repeat(3, axis=2).astype(np.uint8)
        kept = instances if self.with_instances else None
        return LabelledImage(str(index), image, mask, str(index), kept)


def config(**changes: Any) -> TrainConfig:
    loop = {"steps": 3, "batch_size": 2, "learning_rate": 0.01, "warmup_steps": 1}
    data = {"head": {"name": "unet", "widths": [8, 8, 8, 8, 8]}, "mpp": 1.0, "window_px": 32}
    data |= {"extractor": CNN, "trainable": "all", "patch_tiles": [1, 1]}
    return from_mapping(TrainConfig, {**data, "validation_share": 0, "loop": loop, **changes})


def test_border_band_is_what_is_near_a_pixel_outside_of_the_object() -> None:
    rng = np.random.default_rng(0)
    instances = rng.integers(0, 3, (6, 7)).repeat(5, 0).repeat(5, 1).astype(np.int32)
    for width in (1.0, 2.5):
        slow = np.zeros(instances.shape, bool)
        for y, x in zip(*np.nonzero(instances), strict=True):
            others = np.argwhere(instances != instances[y, x])
            slow[y, x] = np.hypot(*(others - (y, x)).T).min() <= width
        assert np.array_equal(border_band(instances, width), slow)
    assert not border_band(np.ones((5, 5), np.int32), 3).any()  # the image's edge is none


def store(data: LabelledDataset, border_px: float = 3.0) -> ImageStore:
    return ImageStore(
        data,
        lambda i, m: to_resolution(i, m, ratio=1.0, resize_px=None),
        limit_bytes=1 << 20,
        border_px=border_px,
    )


def sequence(data: LabelledDataset, background: Background | None = None) -> Patches:
    still = AugmentConfig(scale=(1.0, 1.0), rotate=False)
    return Patches(
        store(data),
        range(4),
        size_px=(64, 64),
        augment=still,
        seed=0,
        background=background,
    )


def test_a_batch_has_classes_and_borders_apart() -> None:
    batch = sequence(Touching()).batch(range(4))
    assert set(np.unique(batch.masks)) <= {0, 1, IGNORE}
    assert (batch.masks[batch.borders] == 1).all()
    inside = (batch.masks == 1) & ~batch.borders
    assert batch.borders.any()
    assert inside.any()
    one = batch.one(2)
    assert one.numbers == (2,)
    assert np.array_equal(one.borders[0], batch.borders[2])


def test_no_instances_is_one_clear_line() -> None:
    data = Touching()
    data.with_instances = False
    with pytest.raises(DatasetError, match="border_um"):
        store(data).get(0)


def test_border_loss_against_its_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 8, 8, generator=generator)
    border = torch.rand(2, 8, 8, generator=generator) > 0.5
    target = torch.ones(2, 8, 8, dtype=torch.long)
    target[:, :3] = IGNORE
    z, y = logits[:, 3:], border[:, 3:].float()
    p = z.sigmoid()
    expected = nnf.binary_cross_entropy_with_logits(z, y)
    expected += 1 - (2 * (p * y).sum() + 1) / (p.square().sum() + y.sum() + 1)
    assert border_loss(logits, border, target).item() == pytest.approx(expected.item(), rel=1e-5)
    assert border_loss(logits, border, torch.full_like(target, IGNORE)).isfinite()


def grey_images(folder: Path) -> Path:
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (80, 80), (7, 7, 7)).save(folder / f"{k}.png")
    return folder


def stored(folder: Path) -> Touching:
    data = Touching()
    data.folder = folder
    return data


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
    with pytest.raises(ConfigError, match="weight"):
        AnnotatedConfig(name, "lung", ("Stroma",), weight=0)
    wanted = {"annotated": [{"dataset": name, "path": "lung", "background": ["Stroma"]}]}
    with pytest.raises(ConfigError, match="neither normalised nor stretched"):
        config(background=wanted, resize_px=64)
    chosen = BackgroundConfig(annotated=(AnnotatedConfig(name, "lung", ("Bone",)),))
    with pytest.raises(ConfigError, match="no class 'Bone'; there are Tumour, Stroma, Normal"):
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


def test_a_border_model_is_trained_stored_and_predicts(tmp_path: Path) -> None:
    objects = {"min_area_um2": 20.0}
    run = config(border_um=2.0, objects=objects, temperature=2.0, loss={"border": 0.5})
    path = train(run, Touching(), build_extractor(CNN), out=tmp_path / "run")
    model = load_model(path, device="cpu")
    assert model.info.border
    assert model.info.objects.min_area_um2 == 20
    image = Touching()[0].image
    found = predict_image(model, image, ratio=0.5)
    assert found.border is not None
    assert found.border.shape == image.shape[:2]
    assert found.probabilities.shape == (2, *image.shape[:2])
    assert np.allclose(found.probabilities.sum(0), 1, atol=1e-5)
    assert found.border.min() >= 0
    assert found.border.max() <= 1
    model.info.__dict__["temperature"] = 1.0
    sharper = predict_image(model, image, ratio=0.5).probabilities
    assert sharper.max() > found.probabilities.max()


def test_the_moving_average_of_weights_is_what_is_kept(tmp_path: Path) -> None:
    """After each step average += (1 - d) (weights - average), d = min(ema, (1 + k) / (10 + k))."""
    run = config(ema=0.5)
    extractor = build_extractor(CNN)
    from wsiseg.models.registry import ModelConfig, build_segmenter

    rows = CLASSES.to_list()
    model: Segmenter = build_segmenter(
        ModelConfig(extractor=CNN, head=run.head, classes=rows, mpp=1.0, window_px=32),
        extractor=extractor,
    )
    inputs = Inputs(Touching(), range(4), [], np.ones((4, 2), np.int64))
    task = HeadTask(model, run, inputs, run=tmp_path, writes=False)
    live = model.head.classifier.weight  # type: ignore[union-attr]
    expected = live.detach().clone()
    for step in range(3):
        with torch.no_grad():
            live.add_(1.0)  # type: ignore[operator, arg-type]
        task.after_step(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected += (1 - decay) * (live.detach() - expected)  # type: ignore[operator]
    kept = task.kept.head.classifier.weight  # type: ignore[union-attr]
    assert torch.allclose(kept, expected)  # type: ignore[arg-type]
    assert not torch.allclose(kept, live)  # type: ignore[arg-type]


def test_averaged_weights_go_on_after_a_stop(tmp_path: Path) -> None:
    loop = {"steps": 4, "batch_size": 2, "warmup_steps": 1, "save_every": 2, "learning_rate": 0.01}
    run = config(ema=0.9, loop=loop)

    def fresh() -> Any:
        torch.manual_seed(0)
        return build_extractor(CNN)

    whole = load_model(train(run, Touching(), fresh(), out=tmp_path / "a"), device="cpu")
    stopped = tmp_path / "b"
    with pytest.MonkeyPatch.context() as patch:
        counted = iter(range(2))

        def fail(self: HeadTask, step: int) -> None:
            if next(counted, None) is None:
                raise KeyboardInterrupt

        original = HeadTask.after_step
        patch.setattr(HeadTask, "after_step", lambda s, k: (fail(s, k), original(s, k))[1])
        with pytest.raises(KeyboardInterrupt):
            train(run, Touching(), fresh(), out=stopped)
    assert json.loads((stopped / "config.json").read_text())["ema"] == 0.9
    state = torch.load(stopped / "state.pt", weights_only=True)
    for group in state["optimiser"]["param_groups"]:
        del group["rate"]  # as older versions wrote it
    torch.save(state, stopped / "state.pt")
    resumed = load_model(train(run, Touching(), fresh(), out=stopped, resume=True), device="cpu")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_extractor_learns_at_a_rate_of_its_own(tmp_path: Path) -> None:
    """The first step of Adam moves every weight by its learning rate, whatever its gradient."""
    loop = {"steps": 1, "batch_size": 2, "learning_rate": 0.01, "warmup_steps": 0}
    loop |= {"weight_decay": 0.0, "log_every": 1}
    extractor = build_extractor(CNN)
    before = {n: p.detach().clone() for n, p in extractor.named_parameters()}
    run = config(loop=loop, extractor_rate=0.1)
    train(run, Touching(), extractor, out=tmp_path)
    moved = [(p.detach() - before[n]).abs().max() for n, p in extractor.named_parameters()]
    assert max(moved).item() == pytest.approx(0.001, rel=0.01)
    state = torch.load(tmp_path / "state.pt", weights_only=True)["optimiser"]
    assert sorted(g["lr"] for g in state["param_groups"]) == pytest.approx([0.001, 0.01])
