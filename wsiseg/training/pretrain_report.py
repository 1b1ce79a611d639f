"""What a stage of the pretraining has learnt: numbers and pictures on held-out images.

Knows no optimisation. Every number is of images that were not trained on, where any are held out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wsiseg.atomic import staged
from wsiseg.models.base import to_tensor
from wsiseg.models.extractors.vit import ViT
from wsiseg.training.autoencoder import AutoencoderTask, codes_used
from wsiseg.training.denoising import REPORTED, steps_at
from wsiseg.training.image_grid import save_grid
from wsiseg.training.image_quality import WINDOW_PX, psnr, ssim
from wsiseg.training.knn import effective_rank, knn_classes, neighbours, spread
from wsiseg.training.latent import DenoiserTask, denoising_error, sample_like
from wsiseg.training.pixel_ddpm import PixelDDPMTask, sample, save_estimates, timestep_errors
from wsiseg.training.tile_pool import TilePool, View
from wsiseg.training.tiles import Pools

CROPS, AT_ONCE = 32, 8
"""Crops that first stage and denoisers are measured on, that latents are scaled by, and crops of
one pass: always so many, so that the numbers depend neither on batch sizes nor on how many
processes share a batch."""
BANK, QUERIES = 1000, 300
"""Training and held-out crops that the encoder is measured on at most: one of an image, several of
a slide, always the same."""
SHOWN = 8
"""Columns of a picture; rows of that of the neighbours, which has as many columns."""
SAMPLED = 4
"""Images that are sampled from noise."""
GAP_PX = 4
_MEASURED = 10**9  # number of the first batch of measured crops, after all of the training's


@dataclass(frozen=True)
class Measured:
    """What a stage is measured on.

    Attributes:
        pools: training and held-out images.
        size_px: side of a crop.
        seed: seed of crops and noise.
        device: where the network is.
    """

    pools: Pools
    size_px: int
    seed: int
    device: torch.device

    def crops(self) -> Iterator[Tensor]:
        """Batches (B, 3, size, size) in [-1, 1] at the target mpp, always the same."""
        return self._batches(self.pools.measured, (1, 1))

    def training_crops(self, scale: tuple[float, float]) -> Iterator[Tensor]:
        """As many of what is trained on, magnified within a range as they are there."""
        return self._batches(self.pools.training, scale)

    def _batches(self, pool: TilePool, scale: tuple[float, float]) -> Iterator[Tensor]:
        for number in range(CROPS // AT_ONCE):
            key = (self.seed, _MEASURED + number)
            pixels = pool.batch(self.size_px, AT_ONCE, key, scale=scale)
            yield to_tensor(pixels, device=self.device)

    def count(self) -> dict[str, float]:
        """How many images were held out, which goes into every report."""
        return {"held_out_images": float(self.pools.held_out_images)}


def write_report(folder: Path, report: Mapping[str, float]) -> None:
    """Write metrics.json and print it.

    Raises:
        OutputError: the file cannot be written.
    """
    with staged(folder / "metrics.json") as (temporary,):
        temporary.write_text(json.dumps(dict(report), indent=1))
    print("  ".join(f"{k} {v:.4g}" for k, v in report.items()), flush=True)


def report_encoder(encoder: ViT, measured: Measured, folder: Path) -> dict[str, float]:
    """Numbers of an encoder and neighbours.png: a row a held-out crop, then its neighbours.

    Returns:
        `spread` and `effective_rank` of the held-out vectors; where at least two labels are among
        training and held-out images, `knn_accuracy` (k = 20, votes of training images) and
        `majority`, the share of the most frequent label. Each but the last also with `random_`:
        of the same network before training.
    """
    report = measured.count()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(measured.seed)
        untrained = ViT(encoder.config).to(measured.device).eval()
    held_out = measured.pools.held_out is not None  # else every image is its own neighbour
    (bank, knowns), (queries, askeds) = (
        _vectors((encoder, untrained), pool, most, measured)
        for pool, most in ((measured.pools.training, BANK), (measured.pools.measured, QUERIES))
    )
    for prefix, known, asked in zip(("", "random_"), knowns, askeds, strict=True):
        report[prefix + "spread"] = spread(asked)
        report[prefix + "effective_rank"] = effective_rank(asked)
        labels = [v.label for v in bank], [v.label for v in queries]
        for name, value in (_accuracy(known, asked, *labels) if held_out else {}).items():
            report[name if name == "majority" else prefix + name] = value
    sides = (bank, knowns[0]), (queries, askeds[0])
    _picture_neighbours(folder / "neighbours.png", *sides, measured)
    return report


def _vectors(
    networks: Sequence[ViT], pool: TilePool, most: int, measured: Measured
) -> tuple[list[View], list[Tensor]]:
    """At most `most` views of a pool, without those that cannot be read, and of each network their
    (views, dim) float32 vectors, on the CPU."""
    views: list[View] = []
    found: list[list[Tensor]] = [[] for _ in networks]
    with torch.no_grad():
        for some, pixels in pool.read(pool.views(most), measured.size_px, AT_ONCE):
            views += some
            images = to_tensor(pixels, device=measured.device)
            for vectors, network in zip(found, networks, strict=True):
                vectors.append(network(images).float().cpu())
    return views, [torch.cat(vectors) for vectors in found]


def _accuracy(
    known: Tensor, asked: Tensor, known_labels: Sequence[str], asked_labels: Sequence[str]
) -> dict[str, float]:
    """`knn_accuracy` and `majority` over what has a label; empty with fewer than two labels."""
    classes = sorted({*known_labels, *asked_labels} - {""})
    inside = [i for i, x in enumerate(known_labels) if x]
    outside = [i for i, x in enumerate(asked_labels) if x]
    if len(classes) < 2 or not inside or not outside:
        return {}
    truth = torch.tensor([classes.index(asked_labels[i]) for i in outside])
    votes = torch.tensor([classes.index(known_labels[i]) for i in inside])
    found = knn_classes(asked[outside], known[inside], votes)
    return {
        "knn_accuracy": float((found == truth).float().mean()),
        "majority": float(torch.bincount(truth).max() / len(truth)),
    }


Side = tuple[list[View], Tensor]


def _picture_neighbours(path: Path, bank: Side, queries: Side, measured: Measured) -> None:
    """A row a query: the query, then the bank's images by falling similarity, without itself."""
    views, rows = queries[0], []
    for i in [k * len(views) // min(SHOWN, len(views)) for k in range(min(SHOWN, len(views)))]:
        others = [k for k, v in enumerate(bank[0]) if v[:2] != views[i][:2]]
        if not others:
            return  # a single image has no neighbour
        _, index = neighbours(queries[1][i : i + 1], bank[1][others], SHOWN - 1)
        shown = [views[i], *(bank[0][others[int(k)]] for k in index[0])]
        pixels = np.stack([v.file.view(measured.size_px, v.number) for v in shown])
        rows.append(to_tensor(pixels, device=measured.device))
    save_grid(path, rows, gap_px=GAP_PX)


def report_autoencoder(task: AutoencoderTask, measured: Measured, folder: Path) -> dict[str, float]:
    """Numbers of a first stage and reconstructions.png: originals above, rebuilt below.

    Returns:
        `psnr` in dB and `ssim` (where crops are as large as its window), means over the crops;
        `l1`; of a VQ first stage `codes_used`, the share of the codes that occur in them.
    """
    sums: dict[str, list[float]] = {}
    used = torch.zeros(task.first_stage.codes, dtype=torch.bool)
    for number, images in enumerate(measured.crops()):
        with torch.no_grad():
            rebuilt = task.reconstruct(images)[0].float().clamp(-1, 1)
        values = {"psnr": psnr(images, rebuilt), "l1": (images - rebuilt).abs()}
        if measured.size_px >= WINDOW_PX:
            values["ssim"] = ssim(images, rebuilt)
        for name, value in values.items():
            sums.setdefault(name, []).append(float(value.mean()))
        if task.first_stage.kind == "vq":
            used |= codes_used(task.network, task.first_stage, images)
        if number == 0:
            rows = [images[:SHOWN], rebuilt[:SHOWN]]
            save_grid(folder / "reconstructions.png", rows, gap_px=GAP_PX)
    report = {**measured.count(), **_means(sums)}
    if task.first_stage.kind == "vq":
        report["codes_used"] = float(used.float().mean())
    return report


def report_denoiser(task: DenoiserTask, measured: Measured, folder: Path) -> dict[str, float]:
    """Numbers of a conditioned denoiser and samples.png.

    The picture shows held-out images above what is sampled from their vectors alone.

    Returns:
        `conditioned`, `null` and `shuffled` of `denoising_error` at the step that features are
        read at, and `t<step>`, `t<step>_null` at the REPORTED shares of T.
    """
    sums: dict[str, list[float]] = {}
    for number, images in enumerate(measured.crops()):
        seed = measured.seed + number
        values = denoising_error(task, images, task.config.timesteps[0], seed=seed)
        for step in steps_at(REPORTED, len(task.alphas_bar)):
            errors = denoising_error(task, images, step, seed=seed)
            values |= {f"t{step}": errors["conditioned"], f"t{step}_null": errors["null"]}
        for name, value in values.items():
            sums.setdefault(name, []).append(value)
        if number == 0:
            shown = images[:SAMPLED]
            rows = [shown, sample_like(task, shown, seed=measured.seed)]
            save_grid(folder / "samples.png", rows, gap_px=GAP_PX)
    return {**measured.count(), **_means(sums)}


def report_pixel_ddpm(task: PixelDDPMTask, measured: Measured, folder: Path) -> dict[str, float]:
    """Numbers of a pixel-space denoiser, of `timestep_errors`; estimates.png and samples.png."""
    sums: dict[str, list[float]] = {}
    for number, images in enumerate(measured.crops()):
        for name, value in timestep_errors(task, images, seed=measured.seed + number).items():
            sums.setdefault(name, []).append(value)
        if number == 0:
            save_estimates(folder / "estimates.png", task, images, seed=measured.seed)
            shape = (3, measured.size_px, measured.size_px)
            made = sample(task, shape, SAMPLED, seed=measured.seed)
            save_grid(folder / "samples.png", [made], gap_px=GAP_PX)
    return {**measured.count(), **_means(sums)}


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: sum(v) / len(v) for name, v in values.items()}
