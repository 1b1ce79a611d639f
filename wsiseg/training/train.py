"""Training of a head on the frozen features of an extractor. Knows no files of any data set.

Source: PathSegDiff (arXiv:2504.06950), section 4: Adam, cross-entropy, only the FCN is trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wsiseg import __version__
from wsiseg.atomic import staged
from wsiseg.config import to_mapping
from wsiseg.datasets.augment import AugmentConfig, at_mpp, random_patch, stain_jitter
from wsiseg.datasets.base import LabelledDataset, grouped_split
from wsiseg.errors import ConfigError, DatasetError, UsageError
from wsiseg.geometry import Point
from wsiseg.models import storage
from wsiseg.models.base import FeatureExtractor, to_tensor
from wsiseg.models.checkpoint import save_checkpoint
from wsiseg.models.registry import ModelConfig, build_segmenter, extractor_mapping
from wsiseg.models.segmenter import Segmenter
from wsiseg.training.evaluate import Evaluation, evaluate
from wsiseg.training.files import append_row, cut_rows
from wsiseg.training.loop import LoopConfig, claim_run, resume_step, run_loop
from wsiseg.training.losses import LossConfig, segmentation_loss

Batch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], list[Point]]


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run."""

    head: Any = field(default_factory=lambda: {"name": "fcn"})
    """Mapping: name in HEADS and its configuration."""
    extractor: Any = field(default_factory=dict)
    """Mapping: what to change of the extractor without other weights, such as timesteps, taps
    (features of several are concatenated) and conditioning."""
    trainable: Literal["none", "decoder", "all"] = "none"
    """What is trained beside the head: nothing, the denoiser's decoder, or all of the denoiser
    (of another extractor: all of it)."""
    mpp: float = 0.5
    """Micrometres per pixel to train and predict at."""
    window_px: int = 768
    """Side of a window at prediction."""
    patch_tiles: tuple[int, int] = (1, 2)
    """Rows and columns of tiles in a training patch."""
    seed: int = 0
    """Seed of weights, patches and noise."""
    validation_share: float = 0.15
    """Share of the images, whole patients, that choose the best weights; 0 = keep the last."""
    validate_every: int = 100
    """Optimiser steps between two validations."""
    augment: AugmentConfig = AugmentConfig()
    """Variation of the patches."""
    loss: LossConfig = LossConfig()
    """Losses."""
    loop: LoopConfig = LoopConfig()
    """Optimisation."""
    licence: str = "unknown"
    """Terms of the weights, which follow from the data's and the extractor's."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"validation_share {self.validation_share}: must be 0 to below 1")
        if self.validate_every < 1 or min(self.patch_tiles) < 1 or self.seed < 0:
            raise ConfigError("validate_every and patch_tiles must be at least 1, seed at least 0")


class HeadTask:
    """Head, and extractor as far as wanted, on patches; validates and keeps the best weights."""

    def __init__(
        self,
        segmenter: Segmenter,
        config: TrainConfig,
        dataset: LabelledDataset,
        *,
        validation: Sequence[int],
        run: Path,
    ) -> None:
        self.segmenter, self.config, self.dataset = segmenter, config, dataset
        self.validation, self.run = validation, run
        segmenter.extractor.requires_grad_(False)
        self.tuned = segmenter.extractor.trainable(config.trainable)
        for parameter in self.tuned:
            parameter.requires_grad_(True)
        self.module = nn.ModuleDict({"head": segmenter.head})
        if self.tuned:
            self.module["extractor"] = segmenter.extractor
        self.module.register_buffer("best", torch.tensor(-1.0))

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are optimised."""
        return [*self.segmenter.head.parameters(), *self.tuned]

    def losses(self, batch: Batch, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """The segmentation loss of a batch of patches; the noise is seeded by the step."""
        images, masks, places = batch
        self.segmenter.eval()
        device = self.segmenter.device
        x = stain_jitter(to_tensor(images, device=device), self.config.augment, generator)
        with torch.set_grad_enabled(bool(self.tuned)):
            features = self.segmenter.features(x, places, seed=self.config.seed + step)
        self.segmenter.head.train()
        logits = self.segmenter.window_logits(features).float()
        target = torch.from_numpy(masks).to(device).long()
        return {"loss": segmentation_loss(logits, target, self.config.loss)}

    def after_step(self, step: int) -> None:
        """Validate now and then, and keep the weights that did best."""
        last = step + 1 == self.config.loop.steps
        if not (last or (step + 1) % self.config.validate_every == 0):
            return
        if not self.validation:
            if last:
                self._keep(-1.0)
            return
        result = self.validate()
        dice = float(result.pixel["dice"])
        row = {"step": step + 1, **{n: result.pixel[n] for n in ("accuracy", "dice", "miou")}}
        append_row(self.run / "validation.csv", row)
        print("  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
        if dice > float(self.module.best):  # type: ignore[arg-type]
            self._keep(dice)

    def validate(self) -> Evaluation:
        """Metrics on the validation images."""
        self.segmenter.eval()
        return evaluate(self.segmenter, self.dataset, indices=self.validation)

    def _keep(self, dice: float) -> None:
        self.module.best.fill_(dice)  # type: ignore[operator]
        with staged(self.run / "best.pt", also=(RuntimeError,)) as (temporary,):
            torch.save(self.module.state_dict(), temporary)


def train(
    config: TrainConfig,
    dataset: LabelledDataset,
    start: FeatureExtractor | Segmenter,
    *,
    out: Path,
    resume: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Train a head and write the best one as a checkpoint.

    Args:
        config: the run's configuration.
        dataset: labelled images to train on; validation images are taken from it by group.
        start: an extractor of `load_extractor`, or a model of `load_model` whose head is gone on
            with. Training is on its device; `config.trainable` says what of it changes.
        out: run folder: config.json, log.csv, validation.csv, state.pt, model.safetensors.
        resume: continue from the state that is there.
        provenance: what the card says of data and extractor.

    Returns:
        The checkpoint.

    Raises:
        UsageError: the folder holds a run already and `resume` is off; `resume` with another
            configuration, extractor or images; a head without weights.
        DatasetError: validation leaves no image to train on.
        ModelError: the loss is no longer finite.
        OutputError: the run folder cannot be written.
    """
    training, held = grouped_split(dataset.groups, config.validation_share, config.seed)
    if not training:
        raise DatasetError(
            f"all {len(dataset)} images are of one group, which validation takes; "
            "set validation_share to 0 or give more images"
        )
    claim_run(out, config, resume=resume)
    torch.manual_seed(config.seed)
    extractor = start.extractor if isinstance(start, Segmenter) else start
    model = ModelConfig(
        extractor=extractor_mapping(extractor),
        head=config.head,
        classes=dataset.classes.to_list(),
        mpp=config.mpp,
        window_px=config.window_px,
    )
    segmenter = build_segmenter(model, extractor=extractor)
    segmenter.to(segmenter.device)  # the extractor's
    if not any(True for _ in segmenter.head.parameters()):
        raise UsageError(f"head {model.head['name']}: has no weights to train; use another head")
    if isinstance(start, Segmenter):
        _continue_head(segmenter, start)
    task = HeadTask(segmenter, config, dataset, validation=held, run=out)
    state = resume_step(out / "state.pt")
    _claim_inputs(out, dataset, extractor, resumed=state[0] > 0)
    cut_rows(out / "validation.csv", state[0])
    batches = patches(dataset, training, config, tile_px=extractor.tile_px, start=state[0])
    run_loop(task, batches, config.loop, run=out, seed=config.seed, state=state)
    task.module.load_state_dict(torch.load(out / "best.pt", weights_only=True))
    card = {
        "training": to_mapping(config),
        "images": {"training": len(training), "validation": len(held)},
        "validation": task.validate().summary() if held else None,
        "wsiseg": __version__,
        **(provenance or {}),
    }
    path = out / "model.safetensors"
    save_checkpoint(path, segmenter.eval(), card=card, licence=config.licence, dtype="float16")
    return path


def _claim_inputs(
    out: Path, dataset: LabelledDataset, extractor: FeatureExtractor, *, resumed: bool
) -> None:
    """Keep which extractor and images a run has in inputs.json; refuse to resume with others."""
    own = storage.fingerprint(extractor_mapping(extractor), extractor.state_dict())
    text = json.dumps({"extractor": own, "images": list(dataset.names)}, indent=1)
    record = out / "inputs.json"
    if resumed and record.exists() and record.read_text() != text:
        raise UsageError(f"{out}: was started with another extractor or images; use another --out")
    with staged(record) as (temporary,):
        temporary.write_text(text)


def _continue_head(segmenter: Segmenter, start: Segmenter) -> None:
    """Take the trained head of `start`, which must have the same classes and shapes."""
    same = segmenter.info.classes.names == start.info.classes.names
    try:
        segmenter.head.load_state_dict(start.head.state_dict() if same else {})
    except RuntimeError as e:
        raise UsageError(
            f"the head of {start.info.name} has other classes or widths; train a new one on its "
            "extractor"
        ) from e


def patches(
    dataset: LabelledDataset,
    indices: Sequence[int],
    config: TrainConfig,
    *,
    tile_px: int,
    start: int = 0,
) -> Iterator[Batch]:
    """Endless batches (images, masks, places); batch n depends only on (seed, n).

    The images are held in memory at the training resolution. Each epoch goes through all of them
    in a new order.
    """
    ratio = dataset.mpp / config.mpp
    items = [at_mpp(item.image, item.mask, ratio) for item in (dataset[i] for i in indices)]
    size = (config.patch_tiles[0] * tile_px, config.patch_tiles[1] * tile_px)
    step, count = start, config.loop.batch_size
    while True:
        rng = np.random.default_rng((config.seed, step))
        images, masks, places = [], [], []
        for k in range(step * count, (step + 1) * count):
            epoch, position = divmod(k, len(items))
            order = np.random.default_rng((config.seed, 1, epoch)).permutation(len(items))
            image, mask = items[int(order[position])]
            patch, target = random_patch(image, mask, size, rng=rng, config=config.augment)
            images.append(patch)
            masks.append(target)
            places.append(Point(int(rng.integers(1 << 16)), int(rng.integers(1 << 16))))
        yield np.stack(images), np.stack(masks), places
        step += 1
