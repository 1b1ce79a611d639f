"""Calibration in the HTML report: what was measured and what it means. Knows no files."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from wsiseg.training.report_tables import number, row_of, table

LABELS = {
    "ece": "Expected calibration error",
    "mce": "Largest gap",
    "nll": "Log loss",
    "brier": "Brier score",
}
MEANING = {
    "ece": "Distance, bin by bin, of the probability of the most likely class from the share of "
    "pixels that are right, mean over the pixels; 0 is perfect.",
    "mce": "The largest such distance of a bin, however few pixels it has.",
    "nll": "Negative log likelihood of the true class, natural logarithm, mean over the pixels.",
    "brier": "Squared errors of the probabilities summed over the classes, mean over the pixels; "
    "from 0, perfect, to 2.",
}


def calibration_section(report: Mapping[str, Any], picture: str) -> str:
    """The measures and `picture`, the HTML of the reliability diagram; nothing without them."""
    values = report.get("calibration")
    if not values:
        return ""
    body = [row_of(LABELS[k], (number(values[k]),), note=note) for k, note in MEANING.items()]
    words = (
        "Of the pixels to whose most likely class the model gives a probability of 0.8, eight in "
        f"ten should be right. {len(values['bins'])} bins of equal width over "
        f"{values['pixels']:,} labelled pixels."
    )
    return (
        f'<section><h2>Can the probabilities be trusted?</h2><p class="soft">{escape(words)}</p>'
        f"{table(('Measure', 'Value', 'Meaning'), body)}{picture}</section>"
    )
