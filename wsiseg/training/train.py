"""Training of a segmenter on labelled images. Knows no files of any data set.

Source: PathSegDiff (arXiv:2504.06950), section 4: Adam, cross-entropy, only the FCN is trained;
the other methods set `trainable`, losses and augmentation in their configurations.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wsiseg.config import difference
from wsiseg.datasets.base import LabelledDataset
from wsiseg.datasets.checks import plain
from wsiseg.errors import ConfigError, UsageError
from wsiseg.models.base import FeatureExtractor
from wsiseg.models.registry import ModelConfig, build_segmenter, extractor_mapping
from wsiseg.models.segmenter import ModelInfo, Segmenter
from wsiseg.stain import StainBasis, normalise_image, target_of
from wsiseg.training.ancestors import BACKGROUND
from wsiseg.training.background import Background
from wsiseg.training.claim import claim_run, essential
from wsiseg.training.feature_cache import FeatureCache
from wsiseg.training.files import resume_step
from wsiseg.training.finish import card_of, write_models
from wsiseg.training.head_task import HeadTask
from wsiseg.training.inputs import Inputs, choose_inputs, claim_inputs, warn_of_unseen
from wsiseg.training.learnt import warn_of_learnt_validation
from wsiseg.training.loop import run_loop
from wsiseg.training.patches import ImageStore, Patches, UInt8, to_resolution, warn_of_enlarging
from wsiseg.training.processes import Processes
from wsiseg.training.train_config import FeatureCacheConfig, TrainConfig

__all__ = ["FeatureCacheConfig", "TrainConfig", "train"]


def train(
    config: TrainConfig,
    dataset: LabelledDataset,
    start: FeatureExtractor | Segmenter,
    *,
    out: Path,
    resume: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Train a segmenter and write the best one as a checkpoint.

    Args:
        config: the run's configuration.
        dataset: labelled images to train on; validation images are taken from it by group.
        start: an extractor, or a model whose head is gone on with; see `starting_point`. Training
            is on its device; `config.trainable` says what of the extractor changes.
        out: run folder: config.json, inputs.json, log.csv, validation.csv, curves.png,
            validation/, tensorboard/, state.pt, model.safetensors (the best) and last.safetensors.
        resume: continue from the state that is there.
        provenance: what the card says of data and extractor; its `extractor` and `ancestors` are
            the cards of `starting_point`.

    Returns:
        The checkpoint.

    Raises:
        UsageError: the folder holds a run already and `resume` is off; `resume` with another
            configuration, extractor or images; a head without weights.
        DatasetError: no image to train on, a class without pixels, no labelled pixel to validate
            on, or an image or mask that cannot be read.
        ModelError: the loss is no longer finite.
        OutputError: the run folder cannot be written.
    """
    processes = Processes()
    if config.loop.batch_size % processes.count:
        raise ConfigError(f"loop.batch_size: must be a multiple of {processes.count} processes")
    inputs = choose_inputs(config, dataset)
    if processes.first:
        if config.resize_px is None:
            warn_of_enlarging(dataset.mpp, _mpp(config))
        if resume and not out.exists():
            warnings.warn(f"{out}: there is no run to resume; a new one begins", stacklevel=2)
        claim_run(out, config, resume=resume)
        warn_of_unseen(inputs)
        print(inputs.described(), flush=True)
    processes.wait()
    inputs = inputs.read()
    torch.manual_seed(config.seed)
    target = _stain_target(config, dataset, inputs.training)
    segmenter = _segmenter(config, dataset, start, target)
    state = resume_step(out / "state.pt")
    batches = training_patches(config, inputs, tile_px=segmenter.extractor.tile_px, target=target)
    key = claim_inputs(
        out,
        inputs,
        segmenter.extractor,
        background=() if batches.background is None else batches.background.names,
        resumed=state[0] > 0,
    )
    path, about = out / "model.safetensors", provenance or {}
    card, licence = card_of(path, config, inputs, batches.background, about)
    if processes.first:
        warn_of_learnt_validation(about, inputs, card.get(BACKGROUND, ()))
    cache = None
    if config.feature_cache.patches:
        cache = FeatureCache(
            out / "features" / f"{key}-{_digest(config)}",
            limit_bytes=round(config.feature_cache.limit_gb * 1e9),
            processes=processes.count,
        )
    task = HeadTask(segmenter, config, inputs, run=out, writes=processes.first, cache=cache)
    stream = batches.batches(
        config.loop.batch_size,
        start=state[0] * config.loop.accumulate,
        share=(processes.index, processes.count),
        pool=config.feature_cache.patches,
    )
    run_loop(task, stream, config.loop, run=out, seed=config.seed, state=state)
    if processes.first:
        shutil.rmtree(out / "features", ignore_errors=True)  # of no use now: room for the models
        write_models(path, task, card, licence)
    processes.wait()
    return path


def training_patches(
    config: TrainConfig,
    inputs: Inputs,
    *,
    tile_px: int,
    target: StainBasis | None = None,
) -> Patches:
    """The augmented patches of a run."""
    ratio = inputs.dataset.mpp / _mpp(config)
    scaled = partial(to_resolution, ratio=ratio, resize_px=config.resize_px)

    def prepare(image: UInt8, mask: UInt8) -> tuple[UInt8, UInt8]:
        return scaled(image if target is None else normalise_image(image, target), mask)

    store = ImageStore(
        inputs.dataset,
        prepare,
        limit_bytes=config.cache_mb << 20,
        border_px=config.border_um / inputs.dataset.mpp,
    )
    background = Background.load(
        config.background,
        inputs.dataset,
        mpp=_mpp(config),
        memory_gb=config.cache_mb / 1000,
        borders=config.border_um > 0,
    )
    rows, columns = config.patch_tiles
    return Patches(
        store,
        inputs.training,
        size_px=(rows * tile_px, columns * tile_px),
        augment=config.augment,
        seed=config.seed,
        background=background,
    )


def _mpp(config: TrainConfig) -> float:
    if config.mpp is None:
        raise ConfigError("mpp: give the micrometres per pixel, or let starting_point choose")
    return config.mpp


def _stain_target(
    config: TrainConfig, dataset: LabelledDataset, training: Sequence[int]
) -> StainBasis | None:
    if config.normalise == "none":
        return None
    if len(set(dataset.files)) < len(dataset):
        text = "normalise: patches go by their own stains here, slides as a whole in prediction"
        warnings.warn(text, stacklevel=2)
    return target_of(dataset[i].image for i in training)


def _segmenter(
    config: TrainConfig,
    dataset: LabelledDataset,
    start: FeatureExtractor | Segmenter,
    target: StainBasis | None,
) -> Segmenter:
    extractor = start.extractor if isinstance(start, Segmenter) else start
    model = ModelConfig(
        extractor=extractor_mapping(extractor),
        head=config.head,
        classes=dataset.classes.to_list(),
        mpp=_mpp(config),
        window_px=config.window_px,
        resize_px=config.resize_px,
        stain_target=target,
        border=config.border_um > 0,
        temperature=config.temperature or 1.0,
        objects=config.objects,
    )
    segmenter = build_segmenter(model, extractor=extractor)
    segmenter.to(segmenter.device)  # the extractor's
    if not any(True for _ in segmenter.head.parameters()):
        raise UsageError(f"head {model.head['name']}: has no weights to train; use another head")
    if isinstance(start, Segmenter):
        _continue_head(segmenter, start)
        _warn_of_other_settings(segmenter.info, start.info)
    return segmenter


def _warn_of_other_settings(wanted: ModelInfo, own: ModelInfo) -> None:
    """Warn of what belongs to a start with its head and is another in this run."""
    if own.objects not in (wanted.objects, type(own.objects)()):
        warnings.warn(
            f"the post-processing of {own.name} is not taken over; set `objects` to what"
            " wsiseg models show says of it, or later by wsiseg models card --set",
            stacklevel=4,
        )
    seen, asked = (
        f"normalise={'none' if info.stain_target is None else 'macenko'} "
        f"resize_px={'null' if info.resize_px is None else info.resize_px}"
        for info in (own, wanted)
    )
    if seen != asked:
        warnings.warn(
            f"{own.name} was trained on images of {seen}, this run has {asked}; if that is not "
            "meant, set them as they were",
            stacklevel=4,
        )


def _continue_head(segmenter: Segmenter, start: Segmenter) -> None:
    """Take the trained head of `start`, which must have the same classes, borders and shapes."""
    wanted, own = segmenter.info, start.info
    found = [text for text in (_other_classes(wanted, own), _other_border(wanted, own)) if text]
    if not found:
        try:
            segmenter.head.load_state_dict(start.head.state_dict())
            return
        except RuntimeError:
            pass
    if other := difference(own.config["head"], wanted.config["head"]):
        found.append(f"head.{other} (set head to {json.dumps(own.config['head'])})")
    raise UsageError(
        f"--with-head: the head of {own.name} does not fit: {'; '.join(found) or 'other shapes'}; "
        "or leave out --with-head, which trains a new one"
    )


def _other_classes(wanted: ModelInfo, own: ModelInfo) -> str:
    """What is to be done about other classes; empty where they are the same."""
    if wanted.classes.names == own.classes.names:
        return ""
    listed, asked = (", ".join(info.classes.names) for info in (own, wanted))
    if len({tuple(sorted(map(plain, info.classes.names))) for info in (own, wanted)}) == 1:
        return (
            f"its classes are in another order or spelling: {listed} (write them so in a YAML "
            f"file for --dataset, which has {asked})"
        )
    return f"its classes are {listed}, those of the data {asked}"


def _other_border(wanted: ModelInfo, own: ModelInfo) -> str:
    """What is to be done about the output for borders; empty where both have one, or none."""
    if wanted.border == own.border:
        return ""
    if own.border:
        training = own.card.get("training")
        known = training.get("border_um") if isinstance(training, Mapping) else None
        return f"it has an output for borders (set border_um to {known or 'what its training had'})"
    return "it has no output for borders (set border_um to 0)"


def _digest(config: TrainConfig) -> str:
    """Short digest of what has an effect in a configuration."""
    return hashlib.sha256(json.dumps(essential(config), sort_keys=True).encode()).hexdigest()[:16]
