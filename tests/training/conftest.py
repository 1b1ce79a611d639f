"""What several files of pretraining tests begin with; each file makes its own once."""

from __future__ import annotations

from pathlib import Path

import pytest
from pretrain_toys import STAGES, made, write_tissue

from wsiseg.training.pretrain import pretrain


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight light and eight dark images, copies two by two."""
    folder = tmp_path_factory.mktemp("tissue")
    write_tissue(folder)
    return folder


@pytest.fixture(scope="module")
def run(tissue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    for stage in STAGES:
        pretrain(stage, made(), data=tissue, out=out)  # type: ignore[arg-type]
    return out
