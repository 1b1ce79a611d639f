"""Which engine shares out the slides of `wsiseg predict`, and whether its options can be."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from wsiseg.cli.predict_settings import Settings
from wsiseg.errors import UsageError
from wsiseg.inference.runtime import find_openvino
from wsiseg.models.devices import cuda_count, pick_device

if TYPE_CHECKING:
    from wsiseg.cli.crew import Crew
    from wsiseg.cli.crew_worker import Orders


def is_shared(settings: Settings) -> bool:
    """Whether workers do the slides, and not this process."""
    asked = settings.gpus is not None or settings.processes is not None
    return settings.engine == "ray" or asked


def check_engine(settings: Settings) -> None:
    """Make sure that the options of the engine can be.

    Raises:
        UsageError: they cannot, or a GPU or what runs the model is not there.
    """
    if settings.processes is not None and settings.processes < 1:
        raise UsageError(f"--processes {settings.processes}: must be at least 1")
    if settings.runtime == "openvino":
        find_openvino()
    if settings.engine == "ray":
        _check_ray(settings)
        return
    for option, value in (("--address", settings.address), ("--gpu-share", settings.gpu_share)):
        if value is not None:
            raise UsageError(f"{option} {value}: is for --engine ray")
    if is_shared(settings):
        devices(settings)


def gather(orders: Orders, slides: int) -> Crew:
    """The workers that a run asks for.

    Args:
        orders: of the run.
        slides: that they will be given; more workers than that are not started.

    Raises:
        UsageError: Ray is not installed, or its cluster cannot be joined.
    """
    settings = orders.settings
    if settings.engine == "ray":
        from wsiseg.cli.crew_ray import RayCrew

        return RayCrew(orders)
    from wsiseg.cli.crew_local import LocalCrew

    names = devices(settings)[: max(1, slides)]
    on_cpu = pick_device(names[0]).type == "cpu"
    threads = max(1, _cores() // len(names)) if on_cpu else None
    return LocalCrew(orders, names, threads=threads)


def devices(settings: Settings) -> list[str]:
    """The device of each process on this machine.

    Raises:
        UsageError: one is not there, or the options contradict one another.
    """
    if settings.gpus is None:
        pick_device(settings.device)
        return [settings.device] * (settings.processes or 1)
    numbers = [part.strip() for part in settings.gpus.split(",")]
    if not all(part.isascii() and part.isdigit() for part in numbers):
        raise UsageError(f"--gpus {settings.gpus}: give numbers with commas between, as 0,1")
    names = [f"cuda:{int(part)}" for part in numbers]
    if len(set(names)) < len(names):
        raise UsageError(f"--gpus {settings.gpus}: each once; --processes puts several on a GPU")
    if settings.device not in ("auto", "cuda"):
        raise UsageError(f"--gpus {settings.gpus}: not together with --device {settings.device}")
    count = settings.processes or len(names)
    if count < len(names):
        raise UsageError(f"--processes {count}: fewer than the GPUs of --gpus {settings.gpus}")
    for name in names:
        try:
            pick_device(name)
        except UsageError as e:
            raise UsageError(f"--gpus {settings.gpus}: {_gpus_here(name)}") from e
    return [names[k % len(names)] for k in range(count)]


def _gpus_here(missing: str) -> str:
    count = cuda_count()
    if not count:
        return "this machine has no CUDA GPU that torch sees; leave --gpus out"
    number = missing.rpartition(":")[2]
    return f"no GPU {number} on this machine, torch sees {count}, counted from 0"


def _check_ray(settings: Settings) -> None:
    if settings.gpus is not None:
        raise UsageError(f"--gpus {settings.gpus}: Ray chooses the GPUs; give --gpu-share")
    if settings.device.startswith("cuda:"):
        raise UsageError(f"--device {settings.device}: Ray chooses the GPU; give --device cuda")
    share = settings.gpu_share
    if share is None:
        return
    if not 0 < share <= 1:
        raise UsageError(f"--gpu-share {share}: must be over 0 and at most 1")
    if settings.device not in ("auto", "cuda"):
        raise UsageError(f"--gpu-share {share}: not together with --device {settings.device}")


def _cores() -> int:
    """Processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
