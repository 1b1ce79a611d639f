"""One model from several of one network: the mean of their weights.

Source: Wortsman et al., Robust fine-tuning of zero-shot models (CVPR 2022) and Model soups (ICML
2022): of models that were trained on from one another, or from one start, it is often better than
each, and costs nothing to run. Of models that have nothing in common the mean is worth nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsiseg.errors import UsageError
from wsiseg.models.card import AFTER_WEIGHTS, MEASURED
from wsiseg.models.checkpoint import load_model, save_checkpoint
from wsiseg.models.segmenter import Segmenter
from wsiseg.training.ancestors import kept_of, lists_images, without_repeats
from wsiseg.training.start import joined


def average_models(models: Sequence[str | Path], out: str | Path) -> None:
    """Write a segmenter whose weights, and running statistics of norms, are the mean of others'.

    Post-processing, temperature and card are the last one's; `averaged` on the card names all, and
    `ancestors` tells of the others, so that images which any has learnt from are known.

    Args:
        models: two or more names or checkpoints.
        out: the .safetensors file to write, in float32.

    Raises:
        UsageError: fewer than two, models that differ in more than their weights or have none.
        CheckpointError, OutputError: as for `load_model` and `save_checkpoint`.
    """
    if len(models) < 2:
        raise UsageError("one model has no mean; give two or more")
    *others, last = (load_model(m, device="cpu") for m in models)
    if not any(True for _ in last.parameters()):
        raise UsageError(f"{last.info.name} has no weights, so it has no mean")
    for other in others:
        _check_alike(other, last)
    card, licence = _card(others, last), joined(m.info.licence for m in (last, *others))
    states = [model.state_dict() for model in (*others, last)]
    last.load_state_dict({name: _mean([s[name] for s in states]) for name in states[-1]})
    save_checkpoint(out, last, card=card, licence=licence)


def _check_alike(model: Segmenter, last: Segmenter) -> None:
    ours, theirs = (
        {k: v for k, v in m.info.config.items() if k not in AFTER_WEIGHTS} for m in (last, model)
    )
    if odd := sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)):
        raise UsageError(
            f"{model.info.name} and {last.info.name} differ in {', '.join(odd)}; only models of "
            "one network and one task have a mean"
        )


def _card(others: Sequence[Segmenter], last: Segmenter) -> dict[str, Any]:
    """The last model's card, without what is true of it alone, and with what others learnt from."""
    left_out = (*MEASURED, "rounded")  # a mean of rounded weights is not rounded
    card = {k: v for k, v in last.info.card.items() if k not in left_out}
    infos = [model.info for model in (*others, last)]
    card["averaged"] = [{"name": info.name, "sha256": info.sha256} for info in infos]
    kept = kept_of(card, with_head=True)[1:]
    for info in infos[:-1]:
        told = {"name": info.name, "sha256": info.sha256, "licence": info.licence}
        kept += kept_of({**info.card, **told}, with_head=True)
    older = without_repeats(card, _once(kept))
    start = {"extractor": older.pop(0)} if "extractor" in card else {}
    return card | start | {"ancestors": older}


def _once(kept: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A card of each file, in the place of its first: the first that lists images, if one does."""
    found: dict[Any, dict[str, Any]] = {}
    for number, about in enumerate(kept):
        file = about.get("sha256") or number
        if file not in found or (lists_images(about) and not lists_images(found[file])):
            found[file] = about  # which stays where the first one was
    return list(found.values())


def _mean(values: Sequence[Tensor]) -> Tensor:
    """Of counts, which are no weights, the last."""
    if not values[-1].is_floating_point():
        return values[-1]
    return torch.stack([v.double() for v in values]).mean(dim=0).to(values[-1].dtype)
