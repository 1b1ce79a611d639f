"""How far probabilities can be trusted, and the temperature that mends them. Knows no networks.

Sources: Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks (ICML 2017):
expected and maximum calibration error, section 2; temperature scaling, section 4.2, equation 9.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from wsiseg.classes import IGNORE

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Pixels = tuple[Floats, Ints]
"""(C, n) values of pixels and their (n,) true classes."""

BINS = 15
"""Bins of equal width over the probability of the most likely class, as Guo et al. take them."""
SMALLEST = float(np.finfo(np.float32).eps)
"""Probabilities below this count as this in the log likelihood, which would be infinite at 0."""
TEMPERATURES = (0.2, 10.0)
"""Temperatures that are looked at."""
PIXELS = 20_000
"""Pixels that `sampled_pixels` takes of an image."""
CHUNK_PX = 1 << 18
"""Pixels, in whole rows, that `Reliability` counts at a time."""
FOLDS = 10
"""Parts in which `checked_temperature` leaves groups out."""


class Reliability:
    """A tally over pixels that says how well probabilities agree with what is right.

    Memory bound: four numbers a bin, whatever the number of images, and while one is counted a few
    copies of `CHUNK_PX` of its pixels.
    """

    def __init__(self, bins: int = BINS) -> None:
        """An empty tally with bins (k / bins, (k + 1) / bins]."""
        self._edges = np.linspace(0.0, 1.0, bins + 1)
        self._count = np.zeros(bins, np.int64)
        self._confidence = np.zeros(bins, np.float64)
        self._right = np.zeros(bins, np.int64)
        self._nll = self._brier = 0.0

    def add(self, probabilities: Floats, truth: UInt8) -> None:
        """Count an image.

        Args:
            probabilities: (C, H, W) float32, which sum to 1 over the classes.
            truth: (H, W) uint8 classes 0..C-1, 255 = ignore.
        """
        step = max(1, CHUNK_PX // max(1, truth.shape[1]))
        for top in range(0, truth.shape[0], step):
            rows = slice(top, top + step)
            self._add(*_labelled(probabilities[:, rows], truth[rows]))

    def _add(self, values: Floats, labels: Ints) -> None:
        """Count pixels."""
        confidence, best = values.max(axis=0), values.argmax(axis=0)
        index = np.searchsorted(self._edges[1:-1], confidence, side="left")
        bins = len(self._count)
        self._count += np.bincount(index, minlength=bins)
        self._confidence += np.bincount(index, weights=confidence, minlength=bins)
        self._right += np.bincount(index[best == labels], minlength=bins)
        own = values[labels, np.arange(len(labels))].astype(np.float64)
        self._nll -= float(np.log(np.maximum(own, SMALLEST)).sum())
        squares = np.square(values, dtype=np.float64).sum()
        self._brier += float(squares - 2 * own.sum() + len(labels))

    @property
    def pixels(self) -> int:
        """Labelled pixels counted so far."""
        return int(self._count.sum())

    def ece(self) -> float:
        """Expected calibration error: |accuracy - confidence| of the bins, weighted by pixels."""
        return float((self._gaps() * self._count).sum() / max(1, self.pixels))

    def mce(self) -> float:
        """Maximum calibration error: the largest |accuracy - confidence| of a bin with pixels."""
        return float(self._gaps().max())

    def nll(self) -> float:
        """Negative log likelihood of a pixel, natural logarithm, mean."""
        return self._nll / max(1, self.pixels)

    def brier(self) -> float:
        """Brier score of a pixel, mean: squared errors summed over the classes, 0 .. 2."""
        return self._brier / max(1, self.pixels)

    def rows(self) -> list[dict[str, Any]]:
        """The bins: low, high, count, confidence and accuracy (means; None in an empty bin)."""
        rows = []
        for k, count in enumerate(self._count.tolist()):
            rows.append(
                {
                    "low": float(self._edges[k]),
                    "high": float(self._edges[k + 1]),
                    "count": count,
                    "confidence": float(self._confidence[k] / count) if count else None,
                    "accuracy": float(self._right[k] / count) if count else None,
                }
            )
        return rows

    def summary(self) -> dict[str, Any]:
        """Pixels, ece, mce, nll, brier and bins, ready for JSON."""
        return {
            "pixels": self.pixels,
            "ece": self.ece(),
            "mce": self.mce(),
            "nll": self.nll(),
            "brier": self.brier(),
            "bins": self.rows(),
        }

    def _gaps(self) -> Doubles:
        """(bins,) |accuracy - confidence|, 0 where a bin is empty."""
        return np.abs(self._right - self._confidence) / np.maximum(1, self._count)


def sampled_pixels(probabilities: Floats, truth: UInt8, *, seed: int, most: int = PIXELS) -> Pixels:
    """Labelled pixels of an image, at most `most`, drawn without replacement.

    Args:
        probabilities: (C, H, W) float32.
        truth: (H, W) uint8 classes 0..C-1, 255 = ignore.
        seed: of the draw; take another for each image.
        most: pixels to keep.

    Returns:
        (C, n) float32 probabilities and their (n,) int64 classes.
    """
    values, labels = _labelled(probabilities, truth)
    if len(labels) > most:
        chosen = np.random.default_rng(seed).choice(len(labels), most, replace=False)
        values, labels = values[:, chosen], labels[chosen]
    return values, labels


def fit_temperature(batches: Iterable[Pixels]) -> float:
    """The temperature T > 0 that minimises the mean -log softmax(log p / T) of the true classes.

    log p are logits up to a constant of each pixel, which the softmax does not see: for the
    probabilities of one window, made at T = 1, this is temperature scaling of its logits exactly.
    Where windows, seeds or views were averaged it is that of the mean, and so an approximation.
    The classes of the pixels do not change, as T keeps their order.

    Args:
        batches: (C, n) float32 probabilities made at temperature 1 and (n,) true classes 0..C-1,
            such as one `sampled_pixels` an image.

    Returns:
        T from `TEMPERATURES`; 1.0 where there are no pixels.
    """
    logits, labels = _stacked(batches)
    if not len(labels):
        return 1.0
    found = minimize_scalar(
        lambda log_t: _log_loss(logits, labels, float(np.exp(log_t))),
        bounds=np.log(TEMPERATURES),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(np.exp(found.x))


def checked_temperature(groups: Mapping[str, Sequence[Pixels]]) -> float:
    """The temperature of all pixels, if temperatures carry over from some groups to others.

    Patients differ in how sure a model is of them, so that the best temperature of a few says
    little of the next. Here the groups (in up to `FOLDS` parts) are left out in turn, and those
    left out are judged at the temperature of the others.

    Args:
        groups: pixels as of `fit_temperature`, by patient or whatever is left out together.

    Returns:
        `fit_temperature` of all, or 1.0 where that of the others did not lower the log loss of
        those left out, or where there are fewer than two groups.
    """
    folds: list[list[Pixels]] = [[] for _ in range(min(FOLDS, len(groups)))]
    if len(folds) < 2:
        return 1.0
    for i, parts in enumerate(groups.values()):
        folds[i % len(folds)].extend(parts)
    gain = 0.0
    for i, own in enumerate(folds):
        others = [part for k, fold in enumerate(folds) if k != i for part in fold]
        logits, labels = _stacked(own)
        if len(labels):
            before = _log_loss(logits, labels, 1.0)
            gain += len(labels) * (before - _log_loss(logits, labels, fit_temperature(others)))
    return fit_temperature(part for fold in folds for part in fold) if gain > 0 else 1.0


def _stacked(batches: Iterable[Pixels]) -> Pixels:
    """(C, N) logits up to a constant and the (N,) classes of all batches."""
    parts = [(_logits(p), np.asarray(t, np.int64)) for p, t in batches]
    if not parts:
        return np.zeros((1, 0), np.float32), np.zeros(0, np.int64)
    logits = np.concatenate([part for part, _ in parts], axis=1)
    return logits, np.concatenate([part for _, part in parts])


def _log_loss(logits: Floats, labels: Ints, temperature: float) -> float:
    """Mean -log softmax(logits / T) of the true classes."""
    scaled = logits / np.float32(temperature)
    scaled -= scaled.max(axis=0)
    total = np.log(np.exp(scaled).sum(axis=0))
    return float((total - scaled[labels, np.arange(len(labels))]).mean(dtype=np.float64))


def _labelled(probabilities: Floats, truth: UInt8) -> Pixels:
    """(C, n) values and (n,) int64 classes of the pixels that are not to be ignored."""
    keep = truth != IGNORE
    return probabilities[:, keep], truth[keep].astype(np.int64)


def _logits(probabilities: Floats) -> Floats:
    """log p, with a floor where p is 0."""
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)).astype(np.float32)
