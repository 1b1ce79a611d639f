from __future__ import annotations

import numpy as np
import pytest

from wsiseg.training.published import PUBLISHED, published_rows
from wsiseg.training.report_tables import LABELS


def test_rows_are_complete_and_in_range() -> None:
    for rows in PUBLISHED.values():
        for row in rows:
            assert row.method
            assert row.source
            assert row.note
            assert row.metrics
            assert set(row.metrics) <= set(LABELS)
            shares = {n: v for n, v in row.metrics.items() if "hausdorff" not in n}
            assert all(0 < v < 1 for v in (*shares.values(), *row.per_class.values()))


@pytest.mark.parametrize("row", [r for rows in PUBLISHED.values() for r in rows if r.per_class])
def test_mean_iou_is_the_mean_of_the_classes(row: object) -> None:
    per_class, metrics = row.per_class, row.metrics  # type: ignore[attr-defined]
    assert np.mean(list(per_class.values())) == pytest.approx(metrics["miou"], abs=6e-5)


def test_the_part_measured_comes_first() -> None:
    assert [r.split for r in published_rows({"name": "glas"}, "testB")] == [
        "testB",
        "testB",
        "testA",
    ]
    assert published_rows({"name": "folder"}, "test") == ()
