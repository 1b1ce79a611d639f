"""Self-distillation, first stage and denoiser, each against its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from wsiseg.datasets.augment import AugmentConfig
from wsiseg.models.extractors.latent import FirstStageConfig, UNetConfig, encode
from wsiseg.models.extractors.pathsegdiff import PathSegDiffConfig
from wsiseg.models.extractors.vit import ViT, ViTConfig
from wsiseg.training.autoencoder import AutoencoderConfig, AutoencoderTask, latent_statistics
from wsiseg.training.dino import DinoConfig, DinoTask
from wsiseg.training.latent import DenoiserConfig, DenoiserTask
from wsiseg.training.loop import LoopConfig

VIT = ViTConfig(dim=16, depth=1, heads=2, position_px=64)
STAGE = FirstStageConfig(kind="kl", channels=(8, 8), layers=1, latent_channels=2, groups=4)
PLAIN = AugmentConfig(stain_gain=0.0, stain_shift=0.0)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def dino() -> DinoTask:
    torch.manual_seed(0)
    config = DinoConfig(global_px=32, local_px=16, local_count=2, prototypes=8, momentum=0.9)
    return DinoTask(VIT, config, PLAIN, LoopConfig(steps=10))


def test_dino_loss_is_the_cross_entropy_of_all_other_crops(dino: DinoTask) -> None:
    module: Any = dino.module
    with torch.no_grad():
        for p in module["student"].parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator(1)))
        module.centre.copy_(0.1 * torch.randn(1, 8, generator=generator(2)))
    centre = module.centre.clone()
    crops: list[torch.Tensor] = []
    view = dino._view

    def keep(*arguments: Any) -> torch.Tensor:
        crops.append(view(*arguments))
        return crops[-1]

    dino._view = keep  # type: ignore[method-assign]
    got = dino.losses(PIXELS, 0, generator())
    assert [c.shape[-1] for c in crops] == [32, 32, 16, 16]

    def logits(which: str, crop: torch.Tensor) -> torch.Tensor:
        net = module[which]
        return net["head"](net["encoder"](crop))  # type: ignore[no-any-return]

    terms = []
    for i in range(2):
        target = torch.softmax((logits("teacher", crops[i]) - centre) / 0.04, -1)
        for j in range(4):
            if i != j:
                log_p = torch.log_softmax(logits("student", crops[j]) / 0.1, -1)
                terms.append(-(target * log_p).sum(-1).mean())
    assert len(terms) == 6
    assert float(got["loss"].detach()) == pytest.approx(
        float(torch.stack(terms).mean().detach()), rel=1e-5
    )
    mean = torch.cat([logits("teacher", c) for c in crops[:2]]).mean(0, keepdim=True)
    got["loss"].backward()
    assert torch.equal(module.centre, centre)  # the same for all batches of a step
    dino.after_step(0, 0.0)
    assert torch.allclose(module.centre, 0.9 * centre + 0.1 * mean, atol=1e-6)
    assert all(p.grad is None for p in module["teacher"].parameters())
    assert all(p.grad is not None for p in dino.parameters() if p.dim() > 1)


@pytest.mark.parametrize(("step", "gone"), [(10, 0.0), (3, 1.0)])
def test_teacher_follows_the_student_and_then_stands_still(
    dino: DinoTask, step: int, gone: float
) -> None:
    module: Any = dino.module
    teacher, student = (next(iter(module[k].parameters())) for k in ("teacher", "student"))
    before = teacher.clone()
    with torch.no_grad():
        student.add_(1.0)
    dino.losses(PIXELS, 0, generator())
    dino.after_step(0, 0.0)
    assert torch.allclose(teacher, before + 0.1, atol=1e-6)
    after = teacher.clone()
    dino.losses(PIXELS, step, generator())
    dino.after_step(step, gone)
    assert torch.equal(teacher, after)
    assert dino.encoder is module["teacher"]["encoder"]


def test_views_are_crops_of_the_image(dino: DinoTask) -> None:
    ramp = torch.linspace(-1, 1, 64).view(1, 1, 1, 64).expand(4, 3, 64, 64)
    whole = dino._view(ramp, 64, (1.0, 1.0), generator())
    for image in whole:
        along = image[0] if float((image[0, 0] - image[0, 1]).abs().max()) < 1e-4 else image[0].T
        line = along[0] if float(along[0, 0]) < 0 else along[0].flip(0)
        assert torch.allclose(line, ramp[0, 0, 0], atol=1e-4)
    small = dino._view(ramp, 32, (0.25, 0.25), generator())
    spans = small.flatten(1).amax(1) - small.flatten(1).amin(1)
    assert torch.allclose(spans, torch.full((4,), 62 / 64), atol=0.05)


def test_latents_are_brought_to_mean_0_and_deviation_1() -> None:
    task = AutoencoderTask(STAGE, AutoencoderConfig(), PLAIN)
    images = torch.rand(4, 3, 32, 32, generator=generator()) * 2 - 1
    measured = latent_statistics(task.network, STAGE, images.split(3))
    with torch.no_grad():
        latents = encode(task.network, measured, images)
    assert float(latents.mean()) == pytest.approx(0, abs=1e-4)
    assert float(latents.std()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_first_stages_learn_at_both_precisions(kind: Any) -> None:
    stage = FirstStageConfig(kind, channels=(8, 8), layers=1, latent_channels=2, groups=4, codes=8)
    for enabled in (False, True):
        task = AutoencoderTask(stage, AutoencoderConfig(), PLAIN)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = task.losses(PIXELS[:2, :32, :32], 0, generator())
        losses["loss"].backward()
        assert all(bool(torch.isfinite(v.detach())) for v in losses.values())
        assert all(p.grad is not None for p in task.network.encoder.parameters())  # type: ignore[union-attr,operator]


def test_kl_term_is_that_of_a_gaussian() -> None:
    task = AutoencoderTask(STAGE, AutoencoderConfig(), PLAIN)
    images = torch.rand(2, 3, 16, 16, generator=generator()) * 2 - 1
    with torch.no_grad():
        net: Any = task.network
        _, term = task.reconstruct(images)
        mean, log_variance = net.quant_conv(net.encoder(images)).chunk(2, dim=1)
    found = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()),
        torch.distributions.Normal(torch.zeros(()), torch.ones(())),
    )
    assert float(term) == pytest.approx(float(found.mean()), rel=1e-4)


def denoiser(**changes: Any) -> DenoiserTask:
    torch.manual_seed(0)
    unet = UNetConfig(channels=(8, 8, 16, 16), context_dim=8, groups=4)
    config = PathSegDiffConfig(VIT, STAGE, unet, region_dim=0, tile_px=64)
    stage = AutoencoderTask(STAGE, AutoencoderConfig(), PLAIN).network
    training = DenoiserConfig(**changes)
    return DenoiserTask(config, training, PLAIN, encoder=ViT(VIT), first_stage=stage)


def test_denoiser_predicts_the_noise_of_its_step() -> None:
    task = denoiser(null_share=1.0)
    seen: dict[str, torch.Tensor] = {}
    error = task.error

    def keep(which: str, *rest: torch.Tensor) -> torch.Tensor:
        seen.update(zip(("latents", "vectors", "t", "noise"), rest, strict=True))
        assert which == "live"
        return error(which, *rest)

    task.error = keep  # type: ignore[method-assign]
    loss = task.losses(PIXELS, 0, generator())["loss"]
    assert float(seen["vectors"].abs().max()) == 0  # all got the null condition
    assert bool(((seen["t"] >= 0) & (seen["t"] < 1000)).all())
    abar = task.alphas_bar[seen["t"]].view(-1, 1, 1, 1)
    noised = abar.sqrt() * seen["latents"] + (1 - abar).sqrt() * seen["noise"]
    live: Any = task.module["live"]
    bias = live["conditioner"].patch_fc.bias.expand(6, 1, -1)
    expected = (live["unet"](noised, seen["t"], bias).sample - seen["noise"]).square().mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in task.encoder.parameters())
    assert all(p.grad is None for p in task.first_stage.parameters())


def test_small_steps_are_drawn_more_often() -> None:
    task, steps = denoiser(timestep_power=2.0), []
    task.error = lambda *a: steps.extend(a[3].tolist()) or a[1].sum()  # type: ignore[func-returns-value,method-assign,assignment]
    for seed in range(40):
        task.losses(PIXELS, 0, generator(seed))
    below = float(np.mean(np.asarray(steps) < 250))
    assert 0.4 < below < 0.6  # P(1000 u^2 < 250) = 1/2


def test_averaged_weights_move_fast_at_first() -> None:
    task = denoiser(ema=0.9)
    average, live = (next(iter(task.module[k].parameters())) for k in ("average", "live"))
    before = average.clone()
    with torch.no_grad():
        live.add_(1.0)
    task.after_step(0, 0.0)
    assert torch.allclose(average, before + 0.9, atol=1e-6)
    now = average.clone()
    task.after_step(10_000, 0.0)
    assert torch.allclose(average, now + 0.1 * (live - now), atol=1e-6)
