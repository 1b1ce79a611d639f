"""The named models: what each one is, and where its weights are. Knows no checkpoint contents.

A name stands for a file bundled beside this module, for weights that were imported once
(`wsiseg models import`), or for a model that has no weights.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wsiseg.errors import CheckpointError, MissingCheckpointError, UsageError
from wsiseg.models.registry import ModelConfig

BUNDLED = Path(__file__).parent
"""Folder of the bundled checkpoints."""

AUTHORS_TERMS = (
    "of the authors' files: the diffusion model comes without a licence, "
    "HIPT under Apache-2.0 with Commons Clause"
)
"""Licence of what is imported from the authors' checkpoints."""

_SOURCES = {
    "ldm": "https://drive.google.com/drive/folders/1kZ69wVEHV3k3Zr1hgS3kftz9cfNb9BxA "
    "(logs/brca_hipt_20x/checkpoints/last.ckpt)",
    "hipt": "https://github.com/mahmoodlab/HIPT "
    "(HIPT_4K/Checkpoints/vit256_small_dino.pth, 704,238,867 bytes, sha256 6960cd5a8657dc8b"
    "b214671aa0c6dbd3f5b698e84386884955836487ddc89e24)",
}


@dataclass(frozen=True)
class ZooEntry:
    """A line of the table.

    Attributes:
        name: what users write.
        summary: one sentence.
        weights: in the package, imported by the user, or none needed.
        licence: terms of the weights.
        extractor: mapping {name, ...configuration} of an architecture; None where the file says.
        config: the whole model, where it has no weights.
        sources: where the original weights are obtained, by part.
        shares: the name whose file it uses, when not its own.
    """

    name: str
    summary: str
    weights: Literal["bundled", "imported", "none"]
    licence: str
    extractor: Mapping[str, Any] | None = None
    config: ModelConfig | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    shares: str = ""

    @property
    def path(self) -> Path | None:
        """Where its file is expected; None for a model without weights."""
        if self.weights == "none":
            return None
        folder = BUNDLED if self.weights == "bundled" else weights_folder()
        return folder / f"{self.shares or self.name}.safetensors"

    @property
    def available(self) -> bool:
        """Whether it can be loaded here and now."""
        return self.path is None or self.path.is_file()


def weights_folder() -> Path:
    """The folder of imported weights: $WSISEG_WEIGHTS, or ~/.cache/wsiseg/weights."""
    named = os.environ.get("WSISEG_WEIGHTS")
    return Path(named) if named else Path.home() / ".cache" / "wsiseg" / "weights"


# PathLDM's KL-f8 autoencoder (configs/autoencoder/tcga_brca_kl_f8.yaml); the scale is CompVis'.
_KL_F8 = {"kind": "kl", "channels": [128, 256, 512, 512], "latent_channels": 4, "scale": 0.18215}

MODELS: dict[str, ZooEntry] = {
    e.name: e
    for e in (
        ZooEntry(
            "glas-small",
            "Glands in colorectal H&E: a small PathSegDiff trained on GlaS.",
            "bundled",
            "research only, non-commercial (the terms of its training data)",
        ),
        ZooEntry(
            "glas-lite",
            "Glands in colorectal H&E: a small U-Net that began with ImageNet's weights.",
            "bundled",
            "research only, non-commercial (the terms of its training data)",
        ),
        ZooEntry(
            "luad-small",
            "Tumour, stroma and other tissue in H&E of lung adenocarcinoma: glas-small's network.",
            "bundled",
            "research only, non-commercial (the terms of its training data)",
        ),
        ZooEntry(
            "stain-threshold",
            "Haematoxylin density by colour deconvolution, two classes; a sanity baseline.",
            "none",
            "Apache-2.0",
            config=ModelConfig(
                extractor={"name": "stain"},
                head={"name": "threshold"},
                classes=[
                    {"name": "Other tissue", "color": [200, 200, 200], "background": True},
                    {"name": "Haematoxylin-rich tissue", "color": [90, 50, 160]},
                ],
                mpp=0.5,
                window_px=768,
            ),
        ),
        ZooEntry(
            "pathsegdiff-brca",
            "PathSegDiff at full size, VQ-f4, guided by HIPT: the released BRCA 20x model.",
            "imported",
            AUTHORS_TERMS,
            extractor={"name": "pathsegdiff"},
            sources=_SOURCES,
        ),
        ZooEntry(
            "pathsegdiff-brca-null",
            "The same with the null condition: a stand-in for the paper's unconditional model.",
            "imported",
            AUTHORS_TERMS,
            extractor={"name": "pathsegdiff", "conditioning": "null"},
            sources=_SOURCES,
            shares="pathsegdiff-brca",
        ),
        ZooEntry(
            "pathsegdiff-kl",
            "PathSegDiff at full size with a KL-f8 first stage, as the paper's text has it.",
            "imported",
            AUTHORS_TERMS,
            extractor={"name": "pathsegdiff", "first_stage": _KL_F8},
            sources={"ldm": "no such weights are published", "hipt": _SOURCES["hipt"]},
        ),
    )
}


def find(name_or_path: str | Path) -> tuple[ZooEntry | None, Path | None]:
    """The zoo entry and the file of a model.

    Returns:
        (entry, None) for a model without weights, (entry, file) for another name of the zoo,
        (None, file) for a path.

    Raises:
        UsageError: an unknown name.
        MissingCheckpointError: a name whose file is to be fetched and is not here.
        CheckpointError: one of the package whose file is lost.
    """
    text = str(name_or_path)
    entry = MODELS.get(text)
    if entry is None:
        path = Path(name_or_path)
        if path.suffix or path.name != text or path.exists():
            return None, path
        near = difflib.get_close_matches(text, MODELS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(MODELS)} or a file"
        raise UsageError(f"model {text!r} is not known; {hint}")
    if entry.available:
        return entry, entry.path
    if entry.weights == "bundled":
        raise CheckpointError(
            f"model {text}: its file is not in this installation; reinstall wsiseg, or train one "
            "with 'wsiseg train'"
        )
    raise MissingCheckpointError(
        f"model {text}: no weights at {entry.path}; 'wsiseg models show {text}' says where to get "
        "them, 'wsiseg models import' brings them in"
    )
