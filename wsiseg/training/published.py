"""Results that the papers print, to stand beside one's own. Data only; measures nothing.

Values are those of the papers' tables, as shares from 0 to 1 (Hausdorff in pixels). A measure that
a paper does not print, or that could not be read there, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

CAVEAT: Final = (
    "Published values do not always follow one definition: some tables mix averages over images, "
    "over classes and over pixels, and they differ in image size and in how ignored pixels are "
    "treated. Compare only rows of the same part, as an orientation and not as a ranking. Our "
    "pixel values come from one pooled confusion matrix at the images' own resolution."
)
"""What to say beside published rows."""

PATHSEGDIFF: Final = "PathSegDiff, arXiv:2504.06950"
NUCLEI: Final = "DDPM features for nuclei segmentation, ISBI 2024"
_MIXED: Final = (
    "The paper's table mixes definitions (its VGG16-FCN8 row has a Dice below its mIoU, which no "
    "single way of averaging can give)"
)
_OBJECTS: Final = (
    "Official object scores of the challenge, from a secondary source; pixel measures not given"
)


@dataclass(frozen=True)
class Row:
    """A published row.

    Attributes:
        method: name in the paper.
        split: part of the data set it was measured on.
        metrics: accuracy, dice, miou, f1, object_f1, object_dice or object_hausdorff.
        source: where it is printed.
        note: what to know when comparing.
        per_class: IoU by class, in the paper's names.
        classes: which of our classes the means are over; empty = all.
    """

    method: str
    split: str
    metrics: Mapping[str, float]
    source: str
    note: str
    per_class: Mapping[str, float] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


MAIN_CLASSES: Final = ("Tumour", "Stroma", "Inflammatory", "Necrosis")
NUCLEUS_CLASSES: Final = ("Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")


def _low_data(images: int, miou: float) -> Row:
    return Row(
        f"DDPM features + MLP ensemble, {images} training images",
        "lowdata-test",
        {"miou": miou},
        NUCLEI,
        "mIoU of five nucleus classes without background",
        classes=NUCLEUS_CLASSES,
    )


PUBLISHED: Final[Mapping[str, tuple[Row, ...]]] = {
    "bcss": (
        Row(
            "PathSegDiff",
            "test",
            {"accuracy": 0.826, "dice": 0.781, "miou": 0.647, "f1": 0.780},
            PATHSEGDIFF,
            f"Five groups of classes, split by institution. {_MIXED}",
        ),
        Row(
            "PathSegDiff, four main classes",
            "test",
            {"miou": 0.7100},
            PATHSEGDIFF,
            "Mean over tumour, stroma, lymphocytes and necrosis only, without other",
            {"TUM": 0.8220, "STR": 0.6998, "LYM": 0.6205, "NEC": 0.6976},
            MAIN_CLASSES,
        ),
    ),
    "glas": (
        Row(
            "PathSegDiff",
            "testB",
            {"accuracy": 0.900, "dice": 0.896, "miou": 0.812, "f1": 0.894},
            PATHSEGDIFF,
            f"Images resized to 768 x 768 px, which distorts their aspect. {_MIXED}",
        ),
        Row(
            "CUMedVision2",
            "testA",
            {"object_f1": 0.9116, "object_dice": 0.8974, "object_hausdorff": 45.42},
            "GlaS challenge contest, secondary source",
            _OBJECTS,
        ),
        Row(
            "CUMedVision2",
            "testB",
            {"object_f1": 0.7158, "object_dice": 0.7810, "object_hausdorff": 160.35},
            "GlaS challenge contest, secondary source",
            _OBJECTS,
        ),
    ),
    "pannuke": (
        Row(
            "DDPM features + MLP ensemble, 448 training images",
            "lowdata-test",
            {"miou": 0.4554},
            NUCLEI,
            "mIoU of five nucleus classes without background; 1132 test images",
            {"Neo": 0.6211, "Inf": 0.4945, "Con": 0.4094, "Dead": 0.1919, "Epi": 0.5601},
            NUCLEUS_CLASSES,
        ),
        *(
            _low_data(images, miou)
            for images, miou in ((28, 0.3298), (56, 0.3667), (112, 0.3964), (224, 0.4341))
        ),
    ),
}
"""Published rows by data set."""


def published_rows(dataset: Mapping[str, Any], split: str) -> tuple[Row, ...]:
    """Rows that our values may stand beside, those of the split first; none where there are none.

    Args:
        dataset: the data set's mapping {name, ...options}; with other classes than the papers'
            there are no rows.
        split: the part measured.
    """
    if dataset.get("classes") == "grades":
        return ()
    rows = PUBLISHED.get(dataset["name"], ())
    return tuple(sorted(rows, key=lambda row: row.split != split))
