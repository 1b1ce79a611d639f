"""The measures, losses and samplers of the pretraining, each against its definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from wsiseg.datasets.augment import AugmentConfig
from wsiseg.errors import ConfigError
from wsiseg.models.diffusion import ScheduleConfig, alphas_bar
from wsiseg.models.extractors.latent import FirstStageConfig, encode
from wsiseg.models.extractors.vit import ViT, ViTConfig
from wsiseg.training.autoencoder import (
    AutoencoderConfig,
    AutoencoderTask,
    codes_used,
    decode,
)
from wsiseg.training.denoising import ddim, steps_at
from wsiseg.training.dino import DinoConfig, DinoTask
from wsiseg.training.discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    fooling_loss,
    hinge_loss,
)
from wsiseg.training.image_grid import save_grid
from wsiseg.training.image_quality import psnr, ssim
from wsiseg.training.knn import effective_rank, knn_classes, neighbours, spread
from wsiseg.training.loop import LoopConfig
from wsiseg.training.perceptual import laplacian_l1, token_l1

PLAIN = AugmentConfig(stain_gain=0.0, stain_shift=0.0)
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
SMALL = DiscriminatorConfig(weight=0.5, channels=8, layers=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=generator(seed)) * 2 - 1


def gaussian_weighted_ssim(a: Any, b: Any) -> float:
    """Wang et al. 2004, window by window."""
    offsets = np.arange(11) - 5
    w = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    c1, c2, found = (0.01 * 2) ** 2, (0.03 * 2) ** 2, []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
            cov = (w * (p - mp) * (q - mq)).sum()
            found.append(
                (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
            )
    return float(np.mean(found))


def test_ssim_is_that_of_the_paper() -> None:
    a = images(2, 3, 14, 17)
    b = (a + 0.3 * images(2, 3, 14, 17, seed=1)).clamp(-1, 1)
    for i in range(2):
        slow = np.mean(
            [gaussian_weighted_ssim(*(v[i, c].double().numpy() for v in (a, b))) for c in range(3)]
        )
        assert float(ssim(a, b)[i]) == pytest.approx(slow, abs=1e-6)
    assert torch.allclose(ssim(a, a), torch.ones(2))


def test_ssim_and_psnr_are_those_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    a = images(1, 3, 40, 30)
    b = (a + 0.2 * images(1, 3, 40, 30, seed=1)).clamp(-1, 1)
    x, y = (v[0].permute(1, 2, 0).double().numpy() for v in (a, b))
    found = metrics.structural_similarity(
        x,
        y,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=2.0,
        channel_axis=2,
    )
    assert float(ssim(a, b)) == pytest.approx(found, abs=1e-4)
    expected = metrics.peak_signal_noise_ratio(x, y, data_range=2.0)
    assert float(psnr(a, b)) == pytest.approx(expected, abs=1e-3)


def test_neighbours_vote_by_their_similarity() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.0, 2.0]])
    classes = torch.tensor([0, 0, 1, 1, 1])
    queries = torch.tensor([[2.0, 0.1], [0.1, 3.0]])
    similarity, index = neighbours(queries, bank, 2)
    assert index[0].tolist() == [0, 1]
    assert float(similarity[0, 0]) == pytest.approx(2 / math.hypot(2, 0.1))
    # With all five as neighbours a plain vote would say 1; the near ones weigh more.
    assert knn_classes(queries, bank, classes, k=5).tolist() == [0, 1]
    vectors, asked = torch.randn(30, 8, generator=generator()), torch.randn(9, 8)
    labels = torch.randint(0, 3, (30,), generator=generator())
    found = knn_classes(asked, vectors, labels, k=7)
    for query, answer in zip(asked, found, strict=True):
        cosines = [
            (float(torch.cosine_similarity(query, v, dim=0)), i) for i, v in enumerate(vectors)
        ]
        votes = [0.0] * 3
        for cosine, i in sorted(cosines, reverse=True)[:7]:
            votes[int(labels[i])] += math.exp(cosine / 0.07)
        assert int(answer) == votes.index(max(votes))


def test_spread_and_rank_tell_collapse() -> None:
    wide = torch.randn(500, 16, generator=generator())
    same = wide[:1] + 1e-4 * wide
    assert 0.95 < spread(wide) <= 1.01
    assert spread(same) < 1e-3
    assert effective_rank(wide) > 15
    assert effective_rank(wide[:, :1] * torch.ones(16)) == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.eye(5)) == pytest.approx(5, abs=1e-9)


def test_grids_lay_images_out(tmp_path: Path) -> None:
    rows = [images(3, 3, 4, 6, seed=s) for s in range(3)]
    save_grid(tmp_path / "plain.png", rows)
    save_grid(tmp_path / "gaps.png", rows, gap_px=2)
    plain, gaps = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("plain", "gaps"))
    assert (plain.shape, gaps.shape) == ((12, 18, 3), (16, 22, 3))
    wanted = ((rows[2][1] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(plain[8:12, 6:12], wanted)
    assert np.array_equal(gaps[12:16, 8:14], wanted)
    assert (gaps[4:6] == 255).all()


def test_sampling_finds_what_the_network_knows() -> None:
    table = alphas_bar(ScheduleConfig(1000, 1e-4, 0.02, "linear"))
    clean, noise = images(2, 3, 4, 4), torch.randn(2, 3, 4, 4, generator=generator(1))

    def oracle(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = table[t].view(-1, 1, 1, 1)
        return (x - abar.sqrt() * clean) / (1 - abar).sqrt()

    for limit in (None, 1.0):
        assert torch.allclose(ddim(oracle, noise, table, limit=limit), clean, atol=1e-3)

    def gaussian(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The best guess where clean values are normal with deviation 0.3 around 0.5."""
        abar = table[t].view(-1, 1, 1, 1)
        mean = (x - abar.sqrt() * 0.5) * (1 - abar).sqrt()
        return mean / (abar * 0.3**2 + 1 - abar)

    made = ddim(gaussian, torch.randn(4000, 1, 1, 1, generator=generator()), table, count=200)
    assert float(made.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(made.std()) == pytest.approx(0.3, abs=0.02)
    assert steps_at((0.5, 0.01, 0.01), 200) == [2, 100]


def test_the_pyramid_sees_every_band() -> None:
    flat = torch.zeros(1, 1, 32, 32)
    assert float(laplacian_l1(flat, flat)) == 0
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    checks = (((x + y) % 2) * 2 - 1)[None, None]
    assert float(laplacian_l1(checks, flat, levels=1)) == pytest.approx(1, abs=0.02)
    wave = torch.sin(2 * math.pi * x / 16)[None, None]
    fine = laplacian_l1(wave, flat, levels=1)
    both = laplacian_l1(wave, flat, levels=3)
    assert float(fine) < 0.1 < 0.5 < float(both)  # a slow wave is in the coarse bands
    a, b = images(1, 3, 16, 16), images(1, 3, 16, 16, seed=1)
    assert torch.allclose(laplacian_l1(a, b), laplacian_l1(b, a))


def test_tokens_are_compared_and_the_encoder_is_left_alone() -> None:
    torch.manual_seed(0)
    encoder = ViT(ViTConfig(dim=16, depth=1, heads=2, position_px=32)).requires_grad_(False)
    a, b = images(2, 3, 32, 32), images(2, 3, 32, 32, seed=1).requires_grad_(True)
    loss = token_l1(encoder, a, b)
    wanted = (encoder.tokens(a)[:, 1:] - encoder.tokens(b)[:, 1:]).abs().mean()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()))
    assert float(token_l1(encoder, a, a)) == 0
    loss.backward()  # type: ignore[no-untyped-call]
    assert b.grad is not None
    assert float(b.grad.abs().sum()) > 0
    assert all(p.grad is None for p in encoder.parameters())


def test_the_discriminator_and_what_it_judges_get_their_own_gradients() -> None:
    torch.manual_seed(0)
    net = PatchDiscriminator(SMALL)
    real = images(2, 3, 16, 16)
    fake = images(2, 3, 16, 16, seed=1).requires_grad_(True)
    fooling = fooling_loss(net, fake)
    assert float(fooling.detach()) == pytest.approx(-float(net(fake).mean().detach()))
    fooling.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in net.parameters())
    assert float(fake.grad.abs().sum()) > 0  # type: ignore[union-attr]
    fake.grad = None
    telling = hinge_loss(net, real, fake)
    expected = (1 - net(real)).clamp_min(0).mean() + (1 + net(fake)).clamp_min(0).mean()
    assert float(telling.detach()) == pytest.approx(0.5 * float(expected.detach()), rel=1e-5)
    telling.backward()  # type: ignore[no-untyped-call]
    assert fake.grad is None
    assert all(p.grad is not None for p in net.parameters())


def test_it_learns_to_tell() -> None:
    torch.manual_seed(0)
    net = PatchDiscriminator(SMALL)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for seed in range(40):
        real, fake = images(4, 3, 16, 16, seed=seed), images(4, 3, 16, 16, seed=seed) * 0.3
        loss = hinge_loss(net, real, fake)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    real = images(4, 3, 16, 16, seed=99)
    with torch.no_grad():
        assert float(net(real).mean()) > 0.5
        assert float(net(0.3 * real).mean()) < -0.5


def test_patches_of_three_layers_see_70_pixels() -> None:
    """As in Isola et al.; group norms are left out, which mix the whole image."""
    net = PatchDiscriminator(DiscriminatorConfig(weight=1.0, channels=8))
    for i, module in enumerate(net.net):
        if isinstance(module, torch.nn.GroupNorm):
            net.net[i] = torch.nn.Identity()
    x = torch.zeros(1, 3, 160, 160, requires_grad=True)
    logits = net(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows = x.grad.abs().sum(dim=(0, 1, 3)).nonzero()  # type: ignore[union-attr]
    assert int(rows.max() - rows.min()) + 1 == 70


def test_the_adaptive_weight_is_a_ratio_of_gradients() -> None:
    w = torch.tensor([2.0, 1.0], requires_grad=True)
    reconstruction, fooling = (3 * w).sum(), (w * torch.tensor([0.0, 0.5])).sum()
    found = adaptive_weight(reconstruction, fooling, w)
    assert float(found) == pytest.approx(3 * math.sqrt(2) / (0.5 + 1e-4), rel=1e-5)
    assert not found.requires_grad
    assert float(adaptive_weight(reconstruction, (0 * w).sum(), w)) == 1e4


def autoencoder(kind: Any = "kl", **changes: Any) -> AutoencoderTask:
    torch.manual_seed(0)
    stage = FirstStageConfig(kind, channels=(8, 8), layers=1, latent_channels=2, groups=4, codes=8)
    return AutoencoderTask(stage, AutoencoderConfig(**changes), PLAIN)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_discriminator_starts_late_and_joins_the_loss(adaptive: bool) -> None:
    options = DiscriminatorConfig(weight=0.5, channels=8, layers=1, start_step=2, adaptive=adaptive)
    task = autoencoder(discriminator=options)
    assert task.discriminator is not None
    early = task.losses(PIXELS, 1, generator())
    early["loss"].backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in task.discriminator.parameters())
    late = task.losses(PIXELS, 2, generator())
    assert set(early) == set(late)  # one header for the log
    factor = float(late["adversarial_weight"])
    assert factor == 0.5 if not adaptive else factor > 0
    extra = factor * float(late["fooling"].detach()) + float(late["telling"].detach())
    assert float((late["loss"] - early["loss"]).detach()) == pytest.approx(extra, rel=1e-4)
    late["loss"].backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in task.discriminator.parameters())
    assert set(map(id, task.discriminator.parameters())) <= set(map(id, task.parameters()))


def test_terms_are_added_with_their_weights() -> None:
    encoder = ViT(ViTConfig(dim=16, depth=1, heads=2, position_px=32))
    plain = autoencoder(edge_weight=0.0, bottleneck_weight=0.0)
    config = AutoencoderConfig(
        edge_weight=0.0, bottleneck_weight=0.0, laplacian_weight=2.0, feature_weight=3.0
    )
    rich = AutoencoderTask(plain.first_stage, config, PLAIN, encoder=encoder)
    rich.network.load_state_dict(plain.network.state_dict())
    a, b = (t.losses(PIXELS, 0, generator()) for t in (plain, rich))
    wanted = a["loss"] + 2 * b["laplacian"] + 3 * b["features"]
    assert float(b["loss"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert min(float(b[k].detach()) for k in ("laplacian", "features")) > 0
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize(("kind", "weight"), [("kl", 1e-4), ("vq", 1.0)])
def test_the_bottleneck_counts_as_is_usual_for_its_kind(kind: Any, weight: float) -> None:
    task = autoencoder(kind)
    found = task.losses(PIXELS, 0, generator())
    rest = float((found["loss"] - found["reconstruction"]).detach())
    assert rest == pytest.approx(weight * float(found["bottleneck"].detach()), abs=1e-6)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_decoding_turns_encoding_back(kind: Any) -> None:
    from dataclasses import replace

    task = autoencoder(kind)
    config = replace(task.first_stage, scale=3.0, shift=0.2)
    x = images(2, 3, 16, 16)
    with torch.no_grad():
        latents = encode(task.network, config, x)
        assert torch.allclose(
            decode(task.network, config, latents), task.reconstruct(x)[0], atol=1e-5
        )


def test_used_codes_are_counted() -> None:
    task = autoencoder("vq")
    x = images(3, 3, 16, 16)
    network: Any = task.network
    with torch.no_grad():
        z = network.quant_conv(network.encoder(x)).permute(0, 2, 3, 1).reshape(-1, 1, 2)
        book = network.quantize.embedding.weight
        nearest = (z - book[None]).square().sum(-1).argmin(-1)
    used = codes_used(task.network, task.first_stage, x)
    assert set(used.nonzero().flatten().tolist()) == set(nearest.tolist())


VIT = ViTConfig(dim=16, depth=1, heads=2, position_px=32)


def masked(share: float = 0.5, **changes: Any) -> DinoTask:
    torch.manual_seed(0)
    config = DinoConfig(
        global_px=64, local_px=32, local_count=1, prototypes=8, mask_share=share, **changes
    )
    return DinoTask(VIT, config, PLAIN, LoopConfig(steps=10))


def test_one_global_crop_of_an_image_is_masked() -> None:
    hidden = masked(0.25)._hidden(50, generator())
    assert hidden.shape == (100, 16)
    counts = hidden.sum(dim=1).view(2, 50)
    assert set(counts.flatten().tolist()) == {0, 4}
    assert bool((counts.sum(dim=0) == 4).all())
    assert 10 < int((counts[0] == 4).sum()) < 40


def test_hidden_patches_are_not_seen_and_are_predicted() -> None:
    task = masked()
    student: Any = task.module["student"]
    from wsiseg.training.dino import _tokens

    x = images(2, 3, 64, 64)
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[0, 5] = True
    other = x.clone()
    other[0, :, 16:32, 16:32] = 0.7  # patch 5: second row, second column
    with torch.no_grad():
        assert torch.equal(_tokens(student, x, hidden), _tokens(student, other, hidden))
        plain = student["encoder"].tokens(x)
        assert not torch.equal(plain, student["encoder"].tokens(other))
        assert torch.equal(plain, _tokens(student, x, None))  # nothing stays behind
    pixels = np.random.default_rng(1).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    losses = task.losses(pixels, 0, generator())
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in task.parameters())
    assert float(student["mask"][0].grad.abs().sum()) > 0
    task.after_step(0, 0.0)
    assert float(task.module.patch_centre.abs().sum()) > 0  # type: ignore[union-attr,operator]
    assert not {"mask", "patch_head"} & set(masked(0.0).module["student"])  # type: ignore[arg-type]
    unweighted = masked(mask_weight=0.0).losses(pixels, 0, generator())
    difference = float((losses["loss"] - unweighted["loss"]).detach())
    assert difference == pytest.approx(float(losses["masked"].detach()), rel=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DiscriminatorConfig(weight=-1.0),
        lambda: DiscriminatorConfig(channels=12),
        lambda: DiscriminatorConfig(layers=0),
        lambda: AutoencoderConfig(laplacian_weight=-0.1),
        lambda: DinoConfig(mask_share=1.0),
    ],
)
def test_options_that_cannot_be(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()
