"""The checks of `wsiseg doctor`, each one a line. Knows what works and how it is mended."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from packaging.requirements import Requirement

from wsiseg import __version__
from wsiseg.errors import ModelError, WsisegError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

OK, WARN, FAIL = "OK", "WARN", "FAIL"
GIB = 1 << 30
MODEL = "glas-small"
TRIED = "openslide-bin"
"""A requirement that has a check of its own: OpenSlide may come from the system, too."""
LOW_GIB, LEAST_GIB = 20, 1
SLOW_MB_S = 50
SAMPLE_MB = 32
SMALL_GPU_GIB = 4
REINSTALL = "install wsiseg again: pip install . in a clone of it, into a fresh environment"
_TROUBLE = (WsisegError, ImportError, OSError, RuntimeError, ValueError, AttributeError, KeyError)


class Check(NamedTuple):
    """One line.

    Attributes:
        name: what was looked at.
        status: OK, WARN (works, with a drawback) or FAIL.
        text: what was found.
        fix: what to do, empty where all is well.
    """

    name: str
    status: str
    text: str
    fix: str = ""


def run_checks(out: Path, *, model: bool = True) -> Iterator[Check]:
    """All checks, one after the other.

    Args:
        out: folder whose disk is measured.
        model: whether to run the bundled model, which takes most of the time.
    """
    steps: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("packages", _packages),
        ("slides", _slides),
        ("torchvision", _torchvision),
        ("device", _devices),
        ("disk", lambda: _disk(out)),
    ]
    if model:
        steps.append(("model", _model))
    for name, step in steps:
        try:
            yield from step()
        except _TROUBLE as e:
            reason = " ".join(str(e).split()) or type(e).__name__
            yield Check(name, FAIL, reason, REINSTALL)


def _packages() -> Iterator[Check]:
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    yield Check("wsiseg", OK, f"{__version__}, Python {platform.python_version()}, {system}")
    for text in metadata.requires("wsiseg") or ():
        needed = Requirement(text)
        if needed.marker is None and needed.name != TRIED:  # those with a marker are extras
            yield _package(needed)


def _package(needed: Requirement) -> Check:
    fix = f'pip install "{needed}"'
    try:
        found = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        return Check(needed.name, FAIL, "not installed", fix)
    if needed.specifier.contains(found, prereleases=True):
        return Check(needed.name, OK, found)
    return Check(needed.name, WARN, f"{found}, but wsiseg is made for {needed.specifier}", fix)


def _slides() -> Iterator[Check]:
    from wsiseg.slides.selfcheck import openslide_version, try_backends

    fixes = {
        "openslide": "pip install --force-reinstall openslide-python openslide-bin",
        "direct": "pip install --force-reinstall tifffile imagecodecs simplejpeg",
        "tiffslide": "pip install --force-reinstall tiffslide tifffile imagecodecs",
    }
    found = {
        "openslide": f"OpenSlide {openslide_version()} reads slides",
        "direct": "reads slides",
        "tiffslide": "reads slides",
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, problem in try_backends(Path(folder)).items():
            if problem:
                yield Check(f"read {name}", FAIL, problem, fixes[name])
            else:
                yield Check(f"read {name}", OK, found[name])


def _torchvision() -> Iterator[Check]:
    from wsiseg.models.selfcheck import torchvision_state

    texts = {
        "absent": "not installed, and not needed",
        "fine": "imports",
        "cured": "its operators do not fit this torch; wsiseg works around that",
    }
    try:
        state = torchvision_state()
    except ModelError as e:
        fix = (
            "pip uninstall torchvision (wsiseg does not need it), or install the one of your torch"
        )
        yield Check("torchvision", FAIL, str(e), fix)
    else:
        yield Check("torchvision", OK, texts[state])


def _devices() -> Iterator[Check]:
    from wsiseg.models.selfcheck import accelerators, built_for_cuda

    found = accelerators()
    for device, name, memory, free in found:
        if memory is None or free is None:
            yield Check(device, OK, name)
            continue
        text = f"{name}, {memory / GIB:.1f} GiB, {free / GIB:.1f} free"
        small = free < SMALL_GPU_GIB * GIB
        fix = "end what else runs on it, or give --batch-size 8" if small else ""
        yield Check(device, WARN if small else OK, text, fix)
    if not found and shutil.which("nvidia-smi"):
        why = "torch cannot use it" if built_for_cuda() else "this torch is built for the CPU only"
        fix = (
            "install the torch for your CUDA version, see pytorch.org; check that nvidia-smi works"
        )
        yield Check("device", WARN, f"an NVIDIA driver is installed, but {why}", fix)
    elif not found:
        text = "CPU only: minutes a slide with the bundled models, hours with a full-size one"
        yield Check("device", WARN, text, "use a machine with an NVIDIA GPU for many slides")


def _disk(out: Path) -> Iterator[Check]:
    name = f"disk {out}"
    if not out.is_dir():
        yield Check(name, FAIL, "no such folder", "make it, or give another one by --out")
        return
    free = shutil.disk_usage(out).free / GIB
    try:
        speed = _write_speed(out)
    except OSError as e:
        yield Check(name, FAIL, f"cannot write there ({e.strerror or e})", "choose another folder")
        return
    text = f"{free:.1f} GiB free, writes {speed:.0f} MB/s"
    if free < LEAST_GIB:
        yield Check(name, FAIL, text, "free some space, or choose another folder by --out")
    elif free < LOW_GIB or speed < SLOW_MB_S:
        yield Check(name, WARN, text, "choose a local disk with more room for --out")
    else:
        yield Check(name, OK, text)


def _write_speed(folder: Path) -> float:
    """MB/s of writing to the disk itself."""
    block = os.urandom(1_000_000)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(SAMPLE_MB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return SAMPLE_MB / max(1e-6, time.perf_counter() - began)


def _model() -> Iterator[Check]:
    from wsiseg.inference.selfcheck import compare, digest, expected_path, read_expected
    from wsiseg.models.selfcheck import accelerators
    from wsiseg.models.zoo import BUNDLED

    path = BUNDLED / f"{MODEL}.safetensors"
    for device in ("cpu", *(a.device for a in accelerators())):
        name = f"model on {device}"
        labels, sha256, seconds = labels_of_model(device)
        try:
            expected = read_expected(expected_path(path), sha256=sha256)
        except ModelError as e:
            yield Check(name, FAIL, str(e), REINSTALL)
            return
        same = digest(labels) == digest(expected)
        agreement = compare(labels, expected)
        found = "the expected labels" if same else f"{agreement.equal:.2%} of the expected labels"
        text = f"{MODEL} gives {found} ({digest(labels)[:12]}) in {seconds:.1f} s"
        if agreement.good:
            yield Check(name, OK, text)
        else:
            fix = "do not trust results of this device: use --device cpu" if device != "cpu" else ""
            yield Check(name, FAIL, text, fix or REINSTALL)


def labels_of_model(device: str) -> tuple[npt.NDArray[np.uint8], str, float]:
    """Labels that the bundled model gives to a synthetic image, its digest, and seconds it took.

    Raises:
        ModelError: the model cannot be loaded.
    """
    from wsiseg.geometry import Box, Size
    from wsiseg.inference.selfcheck import TILES, model_labels
    from wsiseg.models.checkpoint import load_model
    from wsiseg.slides.phantom import render_phantom

    segmenter = load_model(MODEL, device=device)
    side = TILES * segmenter.info.tile_px
    box, slide = Box(side, side, side, side), Size(3 * side, 3 * side)
    image, _ = render_phantom(box, slide, mpp=segmenter.info.mpp, seed=0)
    began = time.perf_counter()
    labels = model_labels(segmenter, image)
    return labels, segmenter.info.sha256, time.perf_counter() - began
