"""A crew of Ray workers: each slide is a task, on this machine or a cluster. Knows no slides.

Ray runs whatever it is sent by whoever reaches its ports. A cluster begun here therefore listens on
the loopback address only and asks for a token that is made for the run; usage statistics and the
dashboard are off. Ray's own retries are off too: those of `share_out` wait for locks and are told.
"""

from __future__ import annotations

import importlib
import os
import secrets
import signal
import socket
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from wsiseg import __version__
from wsiseg.cli.crew import Event, Job, Lost, Report, Running
from wsiseg.cli.crew_worker import Orders, do, ready
from wsiseg.cli.predict_settings import Settings
from wsiseg.cli.predict_slides import Slides
from wsiseg.cli.say import say
from wsiseg.errors import DeviceMemoryError, ModelError, UsageError, WsisegError

WAIT_S = 1.0
END_S = 10.0
AT_ONCE = 500
"""Tasks that Ray holds at a time, running or waiting for room."""
STORE_BYTES = 100 << 20
"""Shared memory of a cluster begun here: only words pass through it."""
_LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # everywhere: a cluster of this machine, on loopback
    "RAY_AUTH_MODE": "token",
}
"""Of a cluster that is begun here."""
_TOLD = ("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
"""Ray prints nothing by itself: lost workers are told of in a line of our own."""
_PATIENCE = ("RAY_NUM_REDIS_GET_RETRIES", "2")
"""What is no cluster is known after a minute or two, not after a quarter of an hour."""


class Board:
    """The actor to which tasks tell their progress."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def tell(self, stem: str, share: float) -> None:
        """`share` of a slide is done."""
        self._told[stem] = share

    def take(self) -> dict[str, float]:
        """What was told since the last call."""
        told, self._told = self._told, {}
        return told


class RayCrew:
    """Slides as Ray tasks."""

    def __init__(self, orders: Orders) -> None:
        """Join a cluster, or begin one on this machine.

        Raises:
            UsageError: Ray is not installed, there is no such cluster, or it has too little.
        """
        settings = orders.settings
        cpus = settings.workers or 1
        self._ray = ray = _joined(settings, cpus)
        try:
            gpus = _gpu_share(ray, settings)
            _check_room(ray, settings, cpus, gpus)
            device = "cuda" if gpus else settings.device.replace("auto", "cpu")
            orders = replace(orders, settings=replace(settings, device=device))
            self._orders = ray.put(orders)
            self._board = _board(ray)
            options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0, "max_calls": 0}
            self._task = ray.remote(**options)(run_slide)
        except BaseException:
            ray.shutdown()
            raise
        self._most = settings.processes or AT_ONCE
        self._waiting: deque[Job] = deque()
        self._given: dict[Any, Job] = {}

    def submit(self, job: Job) -> None:
        """See `Crew`."""
        self._waiting.append(job)

    def events(self) -> Iterator[Event]:
        """See `Crew`."""
        while self._waiting and len(self._given) < self._most:
            job = self._waiting.popleft()
            self._given[self._task.remote(self._orders, job, self._board)] = job
        done = self._ended()
        at_work = {job.task.stem for job in self._given.values()}
        for stem, share in self._told().items():
            if stem in at_work:
                yield Running(stem, share)
        for given in done:
            yield self._result(given, self._given.pop(given))

    def close(self) -> None:
        """See `Crew`. Tasks are asked to end, so that they give their locks back."""
        for given in self._given:
            self._ray.cancel(given)
        if self._given:
            self._ray.wait(list(self._given), num_returns=len(self._given), timeout=END_S)
        self._ray.shutdown()

    def _ended(self) -> list[Any]:
        """Tasks that ended, none of them if that takes too long."""
        try:
            done, _ = self._ray.wait(list(self._given), num_returns=1, timeout=WAIT_S)
        except SystemError as e:  # how Ray hands on what handlers of signals raise, but for Ctrl-C
            raise e.__cause__ or e from None
        return list(done)

    def _told(self) -> dict[str, float]:
        """Progress that tasks told; none where the board was lost, which harms nothing else."""
        try:
            told: dict[str, float] = self._ray.get(self._board.take.remote(), timeout=WAIT_S)
        except self._ray.exceptions.RayError:
            return {}
        return told

    def _result(self, given: Any, job: Job) -> Report | Lost:
        errors = self._ray.exceptions
        try:
            result = self._ray.get(given)
        except errors.RayTaskError as e:  # the function is not there, or has a fault
            line = (str(e.cause).strip().splitlines() or [type(e.cause).__name__])[0]
            raise ModelError(
                f"a Ray worker cannot work ({line}); is the same wsiseg on all nodes?"
            ) from e
        except errors.OutOfMemoryError:
            return Lost(job, "was ended by Ray for lack of memory")
        except errors.RayError as e:
            return Lost(job, f"was lost ({type(e).__name__})")
        if isinstance(result, DeviceMemoryError):
            return Lost(job, f"did not start ({result})")
        if isinstance(result, WsisegError):
            raise result
        assert isinstance(result, Report)
        return result


_SLIDES: dict[str, Slides] = {}
"""What this Ray worker made for a run; it keeps it for the next task."""


def run_slide(orders: Orders, job: Job, board: Any) -> Report | WsisegError:
    """The task: one slide, in a Ray worker; or why this worker cannot do any."""
    host = socket.gethostname()
    if orders.version != __version__:
        return ModelError(
            f"{host} has wsiseg {__version__}, not {orders.version}; install the same everywhere"
        )
    if orders.run not in _SLIDES:
        _SLIDES.clear()
        try:
            _SLIDES[orders.run] = ready(orders, device=orders.settings.device)
        except WsisegError as e:
            return type(e)(f"{e} (on {host})")
    return do(_SLIDES[orders.run], job, lambda r: board.tell.remote(r.stem, r.share))


def _joined(settings: Settings, cpus: int) -> Any:
    """The library, in a cluster."""
    address = settings.address
    os.environ.setdefault(*_TOLD)
    if address is None:
        os.environ.update(_LOCAL)
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    else:
        os.environ.setdefault(*_PATIENCE)
        _check_address(address)
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as e:
        raise UsageError("ray is not installed; pip install 'wsiseg[ray]'") from e
    options: dict[str, Any] = {"address": address or "local"}
    if address is None:
        count = settings.processes * cpus if settings.processes else None
        options |= {"num_cpus": count, "object_store_memory": STORE_BYTES}
        options["include_dashboard"] = False
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **options)
    except (OSError, RuntimeError, ValueError) as e:
        line = (str(e).strip().splitlines() or [type(e).__name__])[0]
        where = f"--address {address}: cannot join" if address else "--engine ray: cannot begin"
        raise UsageError(f"{where} a Ray cluster ({line})") from e
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray sets its own
    return ray


def _board(ray: Any) -> Any:
    """A board on the user's machine, as that one is there to the end."""
    strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
    node = ray.get_runtime_context().get_node_id()
    here = strategies.NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()


def _check_address(address: str) -> None:
    """Make sure that somebody listens there, which Ray itself takes minutes to find out."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise UsageError(f"--address {address}: give HOST:PORT of the head node, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as e:
        raise UsageError(f"--address {address}: nobody listens there ({e})") from e


def _gpu_share(ray: Any, settings: Settings) -> float:
    """The part of a GPU that a task asks for."""
    if settings.gpu_share is not None:
        return settings.gpu_share
    wanted = settings.device == "cuda" or (
        settings.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
    )
    return float(wanted)


def _check_room(ray: Any, settings: Settings, cpus: int, gpus: float) -> None:
    """Make sure that some node has what a task asks for."""
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        if has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus:
            return
    text = f"no node of the Ray cluster has {cpus} CPUs and {gpus:g} GPUs, which a slide asks for"
    if settings.address is None:
        raise UsageError(f"{text}; see --workers, --gpu-share and --device")
    say(f"wsiseg: warning: {text}; waiting for one", err=True)
