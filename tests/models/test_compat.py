"""The torchvision mismatch: a way out where it is needed, nothing where it is not."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wsiseg.models import compat


def run(program: str, path: Path | None = None) -> str:
    """What a program prints in a fresh process, with a folder before all others."""
    start = "" if path is None else f"import sys; sys.path.insert(0, {str(path)!r})\n"
    found = subprocess.run(
        [sys.executable, "-c", start + program], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def package(folder: Path, source: str) -> Path:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(source)
    return folder


def test_timm_imports_in_a_fresh_process() -> None:
    found = run(
        "from wsiseg.models.compat import ensure_torchvision_imports as ensure\n"
        "ensure(); assert ensure() is False\n"
        "import timm, diffusers\n"
        "from timm.models.vision_transformer import VisionTransformer\n"
        "print('imported')"
    )
    assert found.endswith("imported")


def test_missing_operators_are_declared(tmp_path: Path) -> None:
    """A torchvision that fails as the mismatched one does until the operators exist."""
    source = (
        "import torch\n"
        "for name in ('nms', 'qnms'):\n"
        "    try:\n"
        "        getattr(torch.ops.torchvision, name)\n"
        "    except (AttributeError, RuntimeError) as e:\n"
        "        raise RuntimeError('operator torchvision::' + name + ' does not exist') from e\n"
    )
    found = run(
        "from wsiseg.models.compat import ensure_torchvision_imports as ensure\n"
        "print(ensure()); import torchvision; print(ensure())",
        package(tmp_path, source),
    )
    assert found.split() == ["True", "False"]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder whose torchvision is found before any other, in this process."""
    kept = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "torchvision"}
    for name in kept:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules.update(kept)


def test_a_healthy_torchvision_is_left_alone(fake: Path) -> None:
    package(fake, "marker = 1\n")
    before, library = importlib.import_module("torchvision"), compat._library
    assert before.marker == 1
    assert compat.ensure_torchvision_imports() is False
    assert importlib.import_module("torchvision") is before
    assert compat._library is library


def test_another_failure_is_not_hidden(fake: Path) -> None:
    package(fake, "raise RuntimeError('out of luck')\n")
    with pytest.raises(RuntimeError, match="out of luck"):
        compat.ensure_torchvision_imports()
