"""The ensemble of pixel classifiers against the literal one: upsample, join, classify pixels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError
from wsiseg.models.base import Features, FeatureSpec
from wsiseg.models.heads.pixel_mlp import (
    TIE,
    Member,
    PixelMLPConfig,
    PixelMLPHead,
    divergence,
    vote,
)

TILE = 16
SPECS = [
    FeatureSpec(5, 8),
    FeatureSpec(4, 4),
    FeatureSpec(3, 8),
    FeatureSpec(2, 2),
    FeatureSpec(1, 1),
]
CLASSES = 3


def make(seed: int = 0, **changes: object) -> PixelMLPHead:
    torch.manual_seed(seed)
    config = PixelMLPConfig(**{"members": 3, "widths": (8, 4), **changes})  # type: ignore[arg-type]
    head = PixelMLPHead(SPECS, CLASSES, config, tile_px=TILE)
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
        if isinstance(module, torch.nn.Conv1d | torch.nn.Linear):
            torch.nn.init.normal_(module.weight)  # so that members and pixels differ
    return head


def features(rows: int = 2, columns: int = 3, batch: int = 2) -> Features:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(
            batch,
            rows,
            columns,
            s.channels,
            TILE // s.stride,
            TILE // s.stride,
            generator=generator,
        )
        for s in SPECS
    )


def joined(maps: Features) -> Tensor:
    """(B * H * W, channels): every tile's maps to 16 x 16, tiles in their places, a row a pixel."""
    b, r, k = maps[0].shape[:3]
    whole = torch.zeros(b, sum(s.channels for s in SPECS), r * TILE, k * TILE)
    for i in range(r):
        for j in range(k):
            big = [
                nnf.interpolate(m[:, i, j], size=(TILE, TILE), mode="bilinear", align_corners=False)
                for m in maps
            ]
            y, x = i * TILE, j * TILE
            whole[:, :, y : y + TILE, x : x + TILE] = torch.cat(big, dim=1)
    return whole.permute(0, 2, 3, 1).flatten(0, 2)


def literal(member: Member, rows: Tensor) -> Tensor:
    """(N, classes) logits by the definition: Linear, ReLU, BatchNorm, twice, Linear."""
    _, norm1, second, _, norm2, third = member.rest
    x = nnf.linear(rows, member.first.weight, member.first.bias)
    for norm, layer in ((norm1, second), (norm2, third)):
        x = nnf.batch_norm(
            x.relu(), norm.running_mean, norm.running_var, norm.weight, norm.bias, member.training
        )
        x = nnf.linear(x, layer.weight[:, :, 0], layer.bias)
    return x


@torch.inference_mode()
def test_a_member_equals_upsample_join_classify() -> None:
    head, maps = make().eval(), features()
    for member in head.ensemble:
        found = head._windows(member, maps)
        assert found.shape == (2, CLASSES, 2 * TILE, 3 * TILE)
        expected = literal(member, joined(maps))
        ours = found.permute(0, 2, 3, 1).flatten(0, 2)
        assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@torch.inference_mode()
def test_the_first_layer_is_exact_with_its_borders() -> None:
    head, maps = make().eval(), features(1, 1)
    member = head.ensemble[0]
    found = head.first_layer(member, [m.flatten(0, 2) for m in maps])
    expected = nnf.linear(joined(maps), member.first.weight, member.first.bias)
    ours = found.permute(0, 2, 3, 1).flatten(0, 2)
    assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@torch.inference_mode()
def test_pixels_are_read_as_if_maps_were_upsampled() -> None:
    maps = features()
    every = torch.randperm(2 * 2 * TILE * 3 * TILE)
    assert torch.allclose(make().read_pixels(maps, every), joined(maps)[every], atol=1e-5)
    half = make().read_pixels(tuple(m.bfloat16() for m in maps), every)
    assert half.dtype == torch.float32
    rounded = joined(tuple(m.bfloat16().float() for m in maps))
    assert torch.allclose(half, rounded[every], atol=1e-5)


@torch.inference_mode()
def test_prediction_is_the_majority_vote() -> None:
    head, maps = make().eval(), features()
    rows = joined(maps)
    probabilities = torch.stack([literal(m, rows).softmax(1) for m in head.ensemble])
    votes = nnf.one_hot(probabilities.argmax(2), CLASSES).sum(0).float()
    shares = head(maps).softmax(1).permute(0, 2, 3, 1).flatten(0, 2)
    assert float((shares - votes / 3).abs().max()) <= TIE / 3
    score = votes * 1000 + probabilities.mean(0)
    assert float((shares.argmax(1) == score.argmax(1)).float().mean()) > 0.999
    assert len(shares.argmax(1).unique()) == CLASSES
    assert (votes.amax(1) == 1).any(), "no tie in the sample"


def people(*rows: list[float]) -> Tensor:
    """(members, 1, classes, 1, 1)."""
    return torch.tensor(rows)[:, None, :, None, None]


def test_votes_by_hand() -> None:
    found = vote(people([0.6, 0.4, 0.0], [0.9, 0.1, 0.0], [0.2, 0.8, 0.0])).flatten()
    assert found.dtype == torch.float32
    shares = found.softmax(0).tolist()
    assert shares == pytest.approx([2 / 3, 1 / 3, 0], abs=TIE / 3)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert bool(torch.isfinite(found).all())


def test_a_tie_goes_to_the_greater_mean_probability() -> None:
    for a, winner in ((0.55, 1), (0.95, 0)):
        logits = vote(people([a, 1 - a], [0.3, 0.7])).flatten()
        assert int(logits.argmax()) == winner
        assert logits.softmax(0).tolist() == pytest.approx([0.5, 0.5], abs=TIE)
    unanimous = vote(people(*[[0.51, 0.49]] * 2, [0.0, 1.0])).flatten()
    assert int(unanimous.argmax()) == 0, "votes come before probabilities"


def test_divergence_by_hand() -> None:
    assert float(divergence(people([0.7, 0.3], [0.7, 0.3]))) == pytest.approx(0, abs=1e-6)
    assert float(divergence(people([1.0, 0.0], [0.0, 1.0]))) == pytest.approx(1, abs=1e-6)
    # mean (0.6, 0.4): H = 0.6730117; members H(0.9, 0.1) = 0.3250830 and H(0.3, 0.7) = 0.6108643
    by_hand = (0.6730117 - (0.3250830 + 0.6108643) / 2) / math.log(2)
    assert float(divergence(people([0.9, 0.1], [0.3, 0.7]))) == pytest.approx(by_hand, abs=1e-6)
    three = people([1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0])
    two_to_one = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(3)
    assert float(divergence(three)) == pytest.approx(two_to_one, abs=1e-6)


@torch.inference_mode()
def test_uncertainty_covers_the_window() -> None:
    head, maps = make().eval(), features()
    logits, found = head.judge(maps)
    assert torch.equal(logits, head(maps))
    assert found.shape == (2, 2 * TILE, 3 * TILE)
    rows = joined(maps)
    probabilities = torch.stack([literal(m, rows).softmax(1) for m in head.ensemble])
    expected = divergence(probabilities.permute(0, 2, 1)[:, None, ..., None]).flatten()
    assert torch.allclose(found.flatten(), expected, atol=1e-5)
    alone = make(members=1).eval().judge(maps)[1]
    assert float(alone.abs().max()) <= 1e-6


def target() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    found = torch.randint(0, CLASSES, (2, 2 * TILE, 3 * TILE), generator=generator)
    found[torch.rand(found.shape, generator=generator) < 0.5] = 255
    return found


def criterion(logits: Tensor, truth: Tensor) -> Tensor:
    return nnf.cross_entropy(logits, truth, ignore_index=255)


@pytest.mark.parametrize("pixels", [0, 10**6])
def test_loss_is_the_mean_of_the_members_losses(pixels: int) -> None:
    head, maps, truth = make(pixels=pixels).train(), features(), target()
    labelled = truth.flatten() != 255
    rows = joined(maps)
    expected = []
    for member in head.ensemble:
        if pixels:
            expected.append(criterion(literal(member, rows[labelled]), truth.flatten()[labelled]))
        else:
            expected.append(criterion(literal(member, rows), truth.flatten()))
    found = make(pixels=pixels).train().loss(maps, truth, criterion)
    assert float(found.detach()) == pytest.approx(
        float(torch.stack(expected).mean().detach()), rel=1e-5
    )


def test_members_draw_their_own_labelled_pixels() -> None:
    head, maps, truth = make(pixels=50).train(), features(), target()
    seen: list[tuple[torch.Size, Tensor]] = []

    def keep(logits: Tensor, drawn: Tensor) -> Tensor:
        seen.append((logits.shape, drawn))
        return criterion(logits, drawn)

    torch.manual_seed(5)
    draws = [head._draw(truth) for _ in range(3)]
    torch.manual_seed(5)
    head.loss(maps, truth, keep).backward()
    assert [shape for shape, _ in seen] == [(1, CLASSES, 1, 50)] * 3
    for (_, drawn), places in zip(seen, draws, strict=True):
        assert torch.equal(drawn.flatten(), truth.flatten()[places])
        assert int(drawn.max()) < 255
        assert len(places.unique()) == 50
    assert not torch.equal(draws[0], draws[1])
    assert all(p.grad is not None for p in head.parameters())


def test_gradients_reach_the_features() -> None:
    maps = tuple(m.requires_grad_() for m in features())
    make(pixels=40).train().loss(maps, target(), criterion).backward()
    assert all(m.grad is not None and float(m.grad.abs().max()) > 0 for m in maps)


@pytest.mark.parametrize("labelled", [0, 1])
def test_too_few_labelled_pixels_teach_nothing(labelled: int) -> None:
    head = make().train()
    truth = torch.full((2, 2 * TILE, 3 * TILE), 255)
    truth.flatten()[:labelled] = 1
    loss = head.loss(features(), truth, criterion)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and float(p.grad.abs().max()) == 0 for p in head.parameters())


def test_members_learn_and_differ() -> None:
    maps = features()
    truth = (joined(maps)[:, -1] > 0).long().view(2, 2 * TILE, 3 * TILE)
    torch.manual_seed(0)
    config = PixelMLPConfig(members=3, widths=(16, 8), pixels=500)
    head = PixelMLPHead(SPECS, CLASSES, config, tile_px=TILE).train()
    optimiser = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        head.loss(maps, truth, criterion).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    head.eval()
    with torch.inference_mode():
        assert float((head(maps).argmax(1) == truth).float().mean()) > 0.9
        assert float(head.judge(maps)[1].max()) > 0.01


@pytest.mark.parametrize(
    "changes", [{"members": 0}, {"widths": (0, 4)}, {"pixels": -1}, {"pixels": 1}]
)
def test_what_cannot_be(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="head pixel_mlp"):
        PixelMLPConfig(**changes)  # type: ignore[arg-type]


def test_published_widths() -> None:
    head = PixelMLPHead([FeatureSpec(2688, 1)], 6, PixelMLPConfig(), tile_px=256)
    member = 2688 * 128 + 128 + 2 * 128 + 128 * 32 + 32 + 2 * 32 + 32 * 6 + 6
    assert sum(p.numel() for p in head.parameters()) == 10 * member
