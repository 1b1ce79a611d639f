"""A segmenter as a task of the loop: its losses on patches, its validation, its best weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wsiseg.atomic import staged
from wsiseg.classes import IGNORE
from wsiseg.datasets.augment import stain_jitter
from wsiseg.models.base import Features, to_tensor
from wsiseg.models.segmenter import Segmenter
from wsiseg.training.denoising import move_average
from wsiseg.training.evaluate import Evaluation, evaluate
from wsiseg.training.feature_cache import FeatureCache
from wsiseg.training.inputs import Inputs
from wsiseg.training.loop import Outcome
from wsiseg.training.losses import border_loss, segmentation_loss, thin_background
from wsiseg.training.metrics import pixel_metrics
from wsiseg.training.patches import Batch
from wsiseg.training.train_config import TrainConfig


class HeadTask:
    """Head, and extractor as far as wanted, on patches; validates and keeps the best weights.

    Attributes:
        segmenter: what is trained.
        kept: what is validated and kept: the moving average of the weights, or `segmenter` itself.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        config: TrainConfig,
        inputs: Inputs,
        *,
        run: Path,
        writes: bool = True,
        cache: FeatureCache | None = None,
    ) -> None:
        """A task whose files go to `run`, if this is the process that writes."""
        self.segmenter, self.config, self.inputs = segmenter, config, inputs
        self.run, self.writes, self.cache = run, writes, cache
        self.dataset = inputs.dataset
        segmenter.extractor.requires_grad_(False)
        self.tuned = segmenter.extractor.trainable(config.trainable)
        for parameter in (*segmenter.head.parameters(), *self.tuned):
            parameter.requires_grad_(True)
        self.kept = copy.deepcopy(segmenter).requires_grad_(False) if config.ema else segmenter
        self.module = nn.ModuleDict({"head": segmenter.head})
        if self.tuned:
            self.module["extractor"] = segmenter.extractor
        if config.ema:
            self.module["average"] = nn.ModuleDict({n: getattr(self.kept, n) for n in self.module})
        self.module.register_buffer("best", torch.tensor(-1.0, dtype=torch.float64))
        self.module.register_buffer("stale", torch.tensor(0))
        weights = inputs.weights
        self.weights = None if weights is None else weights.to(segmenter.device)
        self.background = [k for k, c in enumerate(self.dataset.classes) if c.background]
        batch = config.loop.batch_size * config.loop.accumulate
        self.epoch_steps = max(1, -(-len(inputs.training) // batch))

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are optimised."""
        return [*self.segmenter.head.parameters(), *self.tuned]

    def rates(self) -> list[float]:
        """Those of the head are 1, those of the extractor what is configured."""
        head = len(list(self.segmenter.head.parameters()))
        return [1.0] * head + [self.config.extractor_rate] * len(self.tuned)

    def losses(self, batch: Batch, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """The segmentation loss of a batch of patches; the noise is seeded by the step."""
        self.segmenter.extractor.train(
            bool(self.tuned) and self.config.trainable in ("all", "network")
        )
        self.segmenter.head.train()
        features = (
            self._features(batch, self.config.seed + step, generator)
            if self.cache is None
            else self._kept_features(batch, self.cache)
        )
        target = torch.from_numpy(batch.masks).long()
        share = self.config.loss.keep_background
        target = thin_background(target, self.background, share, generator)
        target = target.to(self.segmenter.device)
        border, weight = (
            torch.from_numpy(maps).to(target.device)
            for maps in (batch.borders, border_weight(batch, self.config.loss.touching))
        )
        criterion = partial(self._criterion, border=border, weight=weight)
        return {"loss": self.segmenter.head.loss(features, target, criterion)}

    def _criterion(
        self, logits: Tensor, target: Tensor, *, border: Tensor, weight: Tensor
    ) -> Tensor:
        """The loss of logits (B, C[+1], H, W): that of the classes and that of the border.

        `border` and `weight` are (B, H, W): where there is one, and what a pixel counts there.
        """
        count, config = len(self.segmenter.info.classes), self.config.loss
        loss = segmentation_loss(logits[:, :count], target, config, weights=self.weights)
        if self.segmenter.info.border and config.border:
            known = weight * (target != IGNORE)
            loss = loss + config.border * border_loss(logits[:, count], border, known)
        return loss

    def _features(self, batch: Batch, seed: int, generator: torch.Generator) -> Features:
        images = to_tensor(batch.images, device=self.segmenter.device)
        images = stain_jitter(images, self.config.augment, generator)
        with torch.set_grad_enabled(bool(self.tuned)):
            return self.segmenter.features(images, batch.places, seed)

    def _kept_features(self, batch: Batch, cache: FeatureCache) -> Features:
        """Features of the patches, each from the cache or computed by itself and kept."""
        found = []
        for i, number in enumerate(batch.numbers):
            features = cache.get(number)
            if features is None:
                one = batch.one(i)
                own = (self.config.seed * 1_000_003 + number) % 2**63
                generator = torch.Generator().manual_seed(own)
                maps = self._features(one, self.config.seed + number, generator)
                features = tuple(m[0].to(torch.float16) for m in maps)
                cache.put(number, features)
            found.append(features)
        device = self.segmenter.device
        return tuple(
            torch.stack([f.to(device).float() for f in maps]) for maps in zip(*found, strict=True)
        )

    def after_step(self, step: int, gone: float) -> Outcome | None:
        """Validate now and then and keep the weights that did best; stop after `patience`."""
        if self.config.ema:
            average: Any = self.module["average"]
            for name, part in average.items():
                live = self.module[name]
                move_average(part, live, ema=self.config.ema, step=step)
        last = gone == 1 or step + 1 == self.config.loop.steps
        every = self.config.validate_every or self.epoch_steps
        if not self.writes or not (last or (step + 1) % every == 0):
            return None
        if not self.inputs.validation:
            if last:
                self._keep(-1.0)
            return None
        result = self.validate()
        dice = float(result.pixel["dice"])
        stale: Any = self.module.stale
        if dice > float(self.module.best):  # type: ignore[arg-type]
            stale.zero_()
            self._keep(dice)
        else:
            stale.add_(1)
        stop = bool(self.config.patience) and int(stale) >= self.config.patience
        return Outcome({n: result.pixel[n] for n in ("accuracy", "dice", "miou")}, stop)

    def validate(self) -> Evaluation:
        """Metrics on the validation images; their means are over the classes that these have."""
        self.kept.eval()
        result = evaluate(self.kept, self.dataset, indices=self.inputs.validation)
        matrix = np.asarray(result.pixel["confusion"])
        result.pixel = pixel_metrics(matrix, self.kept.info.classes, only_labelled=True)
        return result

    def _keep(self, dice: float) -> None:
        self.module.best.fill_(dice)  # type: ignore[operator]
        with staged(self.run / "best.pt", also=(RuntimeError,)) as (temporary,):
            torch.save(self.module.state_dict(), temporary)


def border_weight(batch: Batch, touching: float) -> npt.NDArray[np.float32]:
    """(B, H, W) what pixels count where borders are learnt: `touching` between two objects, 0 where
    nobody drew any, else 1."""
    weight = np.where(batch.touching, np.float32(touching), np.float32(1))
    return weight * ~batch.undrawn
