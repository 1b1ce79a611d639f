"""Borders of objects as targets, averaged weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as nnf
from touching import CLASSES, CNN, Touching, config, sequence, store

from wsiseg.classes import IGNORE
from wsiseg.datasets.base import LabelledImage
from wsiseg.errors import DatasetError
from wsiseg.models.checkpoint import load_model
from wsiseg.models.registry import ModelConfig, build_extractor, build_segmenter
from wsiseg.models.segmenter import Segmenter
from wsiseg.training.borders import border_band, touching
from wsiseg.training.head_task import HeadTask, border_weight
from wsiseg.training.inputs import Inputs
from wsiseg.training.losses import border_loss
from wsiseg.training.sliding import predict_image
from wsiseg.training.train import train


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


def test_a_batch_has_classes_and_borders_apart() -> None:
    batch = sequence(Touching()).batch(range(4))
    assert set(np.unique(batch.masks)) <= {0, 1, IGNORE}
    assert (batch.masks[batch.borders] == 1).all()
    inside = (batch.masks == 1) & ~batch.borders
    assert batch.borders.any()
    assert inside.any()
    assert (batch.touching & batch.borders).any()
    assert (batch.borders & ~batch.touching).any()
    assert (batch.masks[batch.touching] != IGNORE).all()
    one = batch.one(2)
    assert one.numbers == (2,)
    assert np.array_equal(one.borders[0], batch.borders[2])
    assert np.array_equal(one.touching[0], batch.touching[2])
    batch.undrawn[0] = True
    weight = border_weight(batch, 10.0)
    assert not weight[0].any()
    assert (weight[1:][batch.touching[1:]] == 10).all()
    assert (weight[1:][~batch.touching[1:]] == 1).all()


class Sparse(Touching):
    """The same with the largest number that an object can have."""

    def __getitem__(self, index: int) -> LabelledImage:
        item = super().__getitem__(index)
        assert item.instances is not None
        item.instances[item.instances == 5] = 2**31 - 1
        return item


def test_large_object_numbers_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    find = ndimage.find_objects

    def few(labels: npt.NDArray[np.int32]) -> Any:
        assert labels.max() <= 5  # it makes a list of so many
        return find(labels)

    monkeypatch.setattr(ndimage, "find_objects", few)
    assert np.array_equal(store(Sparse()).get(0)[1], store(Touching()).get(0)[1])


def test_borders_that_nobody_drew_take_no_part(tmp_path: Path) -> None:
    run = config(border_um=2.0)
    rows = CLASSES.to_list()
    of = ModelConfig(extractor=CNN, head=run.head, classes=rows, mpp=1.0, window_px=32, border=True)
    model = build_segmenter(of, extractor=build_extractor(CNN))
    inputs = Inputs(Touching(), range(4), [], np.ones((4, 2), np.int64))
    task = HeadTask(model, run, inputs, run=tmp_path, writes=False)
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    target = torch.ones(2, 8, 8, dtype=torch.long)
    border, weight = torch.zeros(2, 8, 8, dtype=torch.bool), torch.ones(2, 8, 8)
    weight[:, 4:] = 0

    def loss(channel: int, rows: slice) -> float:
        changed = logits.clone()
        changed[:, channel, rows] += 3.0
        return float(task._criterion(changed, target, border=border, weight=weight))

    plain = loss(0, slice(0, 0))
    assert loss(2, slice(4, 8)) == plain  # of the border
    assert loss(2, slice(0, 4)) != plain
    assert loss(1, slice(4, 8)) != plain  # of the class


def test_no_instances_is_one_clear_line() -> None:
    data = Touching()
    data.with_instances = False
    with pytest.raises(DatasetError, match="border_um"):
        store(data).get(0)


def test_border_loss_against_its_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 8, 8, generator=generator)
    border = torch.rand(2, 8, 8, generator=generator) > 0.5
    weight = torch.ones(2, 8, 8)
    weight[:, :3] = 0
    z, y = logits[:, 3:], border[:, 3:].float()
    p = z.sigmoid()
    expected = nnf.binary_cross_entropy_with_logits(z, y)
    expected += 1 - (2 * (p * y).sum() + 1) / (p.square().sum() + y.sum() + 1)
    assert border_loss(logits, border, weight).item() == pytest.approx(expected.item(), rel=1e-5)
    assert border_loss(logits, border, torch.zeros(2, 8, 8)).isfinite()


def test_a_pixel_of_weight_3_counts_as_three() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, border = torch.randn(1, 4, 4, generator=generator), torch.eye(4)[None] > 0
    weight = torch.ones(1, 4, 4)
    weight[0, 1] = 3
    thrice = (torch.cat([x, x[:, 1:2], x[:, 1:2]], dim=1) for x in (logits, border))
    expected = border_loss(*thrice, torch.ones(1, 6, 4))
    assert border_loss(logits, border, weight).item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_lies_between_two_objects() -> None:
    rng = np.random.default_rng(1)
    instances = np.zeros((40, 50), np.int32)
    for number in range(1, 6):
        y, x = rng.integers(0, (30, 40))
        instances[y : y + 12, x : x + 9] = number
    rows, columns = np.indices(instances.shape)
    for width in (1.0, 2.5, 4.0):
        near = np.zeros(instances.shape, int)
        for number in range(1, 6):
            ys, xs = np.nonzero(instances == number)
            apart = np.hypot(rows[..., None] - ys, columns[..., None] - xs).min(axis=2)
            near += apart <= width
        assert np.array_equal(touching(instances, width), near > 1)
        assert (near > 1).any()


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
        task.after_step(step, 0.0)
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
        patch.setattr(HeadTask, "after_step", lambda s, *k: (fail(s, k[0]), original(s, *k))[1])
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
