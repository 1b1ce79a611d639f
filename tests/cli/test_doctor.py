"""`wsiseg doctor`: what works is said to, and what does not comes with a fix."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from wsiseg.cli import cli, doctor_checks
from wsiseg.errors import ModelError, SlideError
from wsiseg.inference import selfcheck
from wsiseg.models import selfcheck as machine
from wsiseg.models.selfcheck import Accelerator
from wsiseg.models.zoo import BUNDLED
from wsiseg.slides import selfcheck as readers

GIB = 1 << 30


def doctor(*options: object) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and checks by name."""
    result = CliRunner().invoke(cli, ["doctor", "--json", *map(str, options)])
    data = json.loads(result.stdout)
    assert data["ok"] == (result.exit_code == 0)
    for check in data["checks"]:
        assert check["status"] in ("OK", "WARN", "FAIL")
        assert bool(check["fix"]) == (check["status"] != "OK"), check
        assert "\n" not in check["text"] + check["fix"]
    return result.exit_code, {c["name"]: c for c in data["checks"]}


def test_here_everything_works(tmp_path: Path) -> None:
    code, checks = doctor("--out", tmp_path)
    assert checks["model on cpu"]["status"] == "OK", (
        "after a new bundled model run python tests/write_expected_labels.py"
    )
    failed = {n for n, c in checks.items() if c["status"] == "FAIL"}
    assert code == 0 or failed == {f"disk {tmp_path}"}
    assert checks["torch"]["text"] == metadata.version("torch")
    assert checks["read openslide"]["text"].startswith("OpenSlide 4")
    assert list(tmp_path.iterdir()) == []


def test_lines_for_people(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", "--no-model", "--out", str(tmp_path / "no")])
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("FAIL"))
    assert "no such folder" in lines[at]
    assert lines[at + 1].strip() == "fix: make it, or give another one by --out"
    assert lines[-1].endswith("1 failed")


def test_packages_that_are_missing_or_of_another_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = metadata.version

    def version(name: str) -> str:
        if name == "matplotlib":
            raise metadata.PackageNotFoundError(name)
        return "2.18.0" if name == "zarr" else right(name)

    monkeypatch.setattr(metadata, "version", version)
    code, checks = doctor("--no-model", "--out", tmp_path)
    assert code == 1
    assert (checks["matplotlib"]["status"], checks["zarr"]["status"]) == ("FAIL", "WARN")
    assert checks["zarr"]["text"].startswith("2.18.0, but wsiseg is made for")
    assert checks["zarr"]["fix"].startswith('pip install "zarr<4')
    assert "ray" not in checks


def test_slide_readers_that_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = readers.open_slide

    def open_slide(path: Path, *, backend: str) -> Any:
        if backend == "openslide":
            raise SlideError("libopenslide is missing")
        slide = right(path, backend=backend)
        monkeypatch.setattr(slide, "read", lambda box, grid: np.zeros((520, 600, 3), np.uint8))
        return slide

    monkeypatch.setattr(readers, "open_slide", open_slide)
    code, checks = doctor("--no-model", "--out", tmp_path)
    assert code == 1
    assert checks["read openslide"]["text"] == "libopenslide is missing"
    assert "openslide-bin" in checks["read openslide"]["fix"]
    assert "other pixels" in checks["read tiffslide"]["text"]


@pytest.mark.parametrize(
    ("free", "status"), [(0.5 * GIB, "FAIL"), (5 * GIB, "WARN"), (500 * GIB, "OK")]
)
def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, status: str) -> None:
    usage = namedtuple("usage", "total used free")(0, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(doctor_checks, "_write_speed", lambda folder: 400.0)
    (check,) = doctor_checks._disk(tmp_path)
    assert check.status == status
    monkeypatch.setattr(doctor_checks, "_write_speed", lambda folder: 5.0)
    (check,) = doctor_checks._disk(tmp_path)
    assert check.status == ("FAIL" if status == "FAIL" else "WARN")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [
        Accelerator("cuda:0", "Big", 80 * GIB, 70 * GIB),
        Accelerator("cuda:1", "Busy", 80 * GIB, GIB),
        Accelerator("mps", "Apple GPU", None, None),
    ]
    monkeypatch.setattr(machine, "accelerators", lambda: gpus)
    assert [c.status for c in doctor_checks._devices()] == ["OK", "WARN", "OK"]
    monkeypatch.setattr(machine, "accelerators", list)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(machine, "built_for_cuda", lambda: False)
    (check,) = doctor_checks._devices()
    assert "built for the CPU only" in check.text


def test_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bool:
        raise RuntimeError("another\nreason")

    for cured, word in ((True, "works around"), (False, "imports")):
        monkeypatch.setattr(machine, "ensure_torchvision_imports", lambda cured=cured: cured)
        (check,) = doctor_checks._torchvision()
        assert check.status == "OK"
        assert word in check.text
    monkeypatch.setattr(machine, "ensure_torchvision_imports", fail)
    (check,) = doctor_checks._torchvision()
    assert (check.status, "another reason" in check.text) == ("FAIL", True)


def test_a_step_that_breaks_does_not_end_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> Any:
        raise ImportError("no such library")
        yield

    monkeypatch.setattr(doctor_checks, "_slides", fail)
    code, checks = doctor("--no-model", "--out", tmp_path)
    assert code == 1
    assert checks["slides"]["text"] == "no such library"
    assert "pip install . in a clone" in checks["slides"]["fix"]  # no index has it
    assert f"disk {tmp_path}" in checks


@pytest.fixture
def expected() -> np.ndarray[Any, Any]:
    sha256 = _model_of(selfcheck.expected_path(BUNDLED / "glas-small.safetensors"))
    return selfcheck.read_expected(
        selfcheck.expected_path(BUNDLED / "glas-small.safetensors"), sha256=sha256
    )


def _model_of(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        return str(image.info["model"])


def test_labels_may_differ_by_rounding_only(expected: np.ndarray[Any, Any]) -> None:
    assert set(np.unique(expected)) == {1, 2}
    edge = expected.copy()
    edge[0, :40] = 3 - edge[0, :40]
    assert selfcheck.compare(edge, expected).good
    assert not selfcheck.compare(np.roll(expected, 4, 1), expected).good
    assert not selfcheck.compare(np.ones_like(expected), expected).good
    assert not selfcheck.compare(expected[:-1], expected).good


@pytest.mark.parametrize("change", ["labels", "model"])
def test_a_model_that_is_not_itself_fails(
    monkeypatch: pytest.MonkeyPatch, expected: np.ndarray[Any, Any], change: str
) -> None:
    sha256 = _model_of(selfcheck.expected_path(BUNDLED / "glas-small.safetensors"))
    given = (np.flipud(expected), sha256) if change == "labels" else (expected, "0" * 64)
    monkeypatch.setattr(doctor_checks, "labels_of_model", lambda device: (*given, 1.0))
    monkeypatch.setattr(machine, "accelerators", list)
    (check,) = doctor_checks._model()
    assert check.status == "FAIL"
    assert ("of the expected labels" in check.text) == (change == "labels")


def test_expected_labels_are_kept_and_checked(tmp_path: Path) -> None:
    labels = np.array([[1, 2, 3], [4, 5, 250]], np.uint8)
    selfcheck.write_expected(tmp_path / "x.png", labels, sha256="ab")
    assert np.array_equal(selfcheck.read_expected(tmp_path / "x.png", sha256="ab"), labels)
    with pytest.raises(ModelError, match="another model file"):
        selfcheck.read_expected(tmp_path / "x.png", sha256="cd")
    (tmp_path / "x.png").write_bytes(b"no picture")
    for name in ("x.png", "missing.png"):
        with pytest.raises(ModelError, match="cannot be read"):
            selfcheck.read_expected(tmp_path / name, sha256="ab")
