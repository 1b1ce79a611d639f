"""What the performance rows share: targets, clocks, memory, reports. Knows no models or slides."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from wsiseg.atomic import staged
from wsiseg.errors import UsageError

MIB = 1 << 20
PACKAGES = ("wsiseg", "torch", "numpy", "openslide-python", "tifffile", "zarr", "shapely")


@dataclass(frozen=True)
class Judged:
    """A measured number beside its target.

    Attributes:
        what: the quantity, with its unit.
        measured: its value.
        sense: ">=" or "<=".
        target: what it should be at least or at most.
    """

    what: str
    measured: float
    sense: str
    target: float

    @property
    def met(self) -> bool:
        """Whether the target is reached; a value that is no number does not."""
        if self.sense == ">=":
            return self.measured >= self.target
        return self.measured <= self.target

    def line(self) -> str:
        """Such as "gain: 2.1, target >= 2, met"."""
        verdict = "met" if self.met else "missed"
        return f"{self.what}: {self.measured:.4g}, target {self.sense} {self.target:g}, {verdict}"


class Row:
    """One row of the table: equality first, then numbers against targets.

    The process ends with 1 at the first output that is not equal, and in `finish` where `check`
    was asked for and a target is missed.
    """

    def __init__(self, title: str, *, json_path: Path | None, check: bool) -> None:
        self._title, self._json, self._check = title, json_path, check
        self._equal: list[str] = []
        self._judged: list[Judged] = []
        self._numbers: dict[str, Any] = {}
        click.echo(title)

    def equal(self, what: str, holds: bool) -> None:
        """State that outputs are equal; where they are not, this is the end."""
        self._equal.append(what)
        click.echo(f"  {'equal' if holds else 'NOT EQUAL'}: {what}")
        if not holds:
            self._judged.clear()
            self._write(equal=False)
            sys.exit(1)

    def judge(self, what: str, measured: float, sense: str, target: float) -> None:
        """Set a number beside its target."""
        self._judged.append(Judged(what, float(measured), sense, target))
        click.echo(f"  {self._judged[-1].line()}")

    def note(self, **numbers: Any) -> None:
        """Keep numbers that no target judges."""
        self._numbers.update(numbers)
        for name, value in numbers.items():
            text = f"{value:.4g}" if isinstance(value, float) else value
            click.echo(f"  {name}: {text}")

    def finish(self) -> None:
        """Write the numbers; end with 1 where a target is missed and that was to be checked."""
        self._write(equal=True)
        if self._check and not all(j.met for j in self._judged):
            sys.exit(1)

    def _write(self, *, equal: bool) -> None:
        if self._json is None:
            return
        result = {
            "row": self._title,
            "command": command_line(),
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "versions": versions(),
            "equal": equal,
            "compared": self._equal,
            "judged": [{**asdict(j), "met": j.met} for j in self._judged],
            "numbers": self._numbers,
            "passed": equal and all(j.met for j in self._judged),
        }
        with staged(self._json) as (temporary,):
            temporary.write_text(json.dumps(result, indent=1) + "\n")


def command_line() -> str:
    """The command of this process, without folders and without where its numbers go."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    if "--json" in words:
        del words[(place := words.index("--json")) : place + 2]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def row_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every row has: --threads, --json, --check."""
    options = [
        click.option("--threads", type=click.IntRange(1), help="Threads of torch."),
        click.option("--json", "json_path", type=click.Path(path_type=Path), help="Numbers here."),
        click.option("--check", is_flag=True, help="Exit code 1 where a target is missed."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def open_row(title: str, words: dict[str, Any]) -> Row:
    """The row of a command, its common options taken out of `words` and set."""
    threads = words.pop("threads")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return Row(title, json_path=words.pop("json_path"), check=words.pop("check"))


@dataclass
class Span:
    """How long a block took.

    Attributes:
        wall: seconds of the clock.
        cpu: seconds of all threads of the process.
    """

    wall: float = 0.0
    cpu: float = 0.0


@contextmanager
def timed(span: Span) -> Iterator[None]:
    """Add the time of the block to `span`."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        span.wall += time.perf_counter() - wall
        span.cpu += time.process_time() - cpu


@dataclass
class Memory:
    """Resident memory around a block, in bytes.

    Attributes:
        before: when it began.
        peak: the most while it ran.
    """

    before: int = 0
    peak: int = 0

    @property
    def mib(self) -> float:
        """What the block added at its peak, in MiB."""
        return (self.peak - self.before) / MIB


@contextmanager
def watched(memory: Memory) -> Iterator[None]:
    """Note the resident memory of this process before the block and at its peak.

    Raises:
        UsageError: the system does not tell (it is not Linux).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    except OSError as e:
        raise UsageError("memory can be measured on Linux only") from e
    memory.before = _status("VmRSS")
    try:
        yield
    finally:
        memory.peak = _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def in_child(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The result of a benchmark's function in a process of its own, so that memory is its own.

    Args:
        function: a function of a module in this folder, which gives what JSON can hold.
        *arguments: what JSON can hold.

    Raises:
        UsageError: the process failed; its last line of error is told.
    """
    call = json.dumps([Path(function.__code__.co_filename).stem, function.__name__, arguments])
    words = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), call]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UsageError(f"{function.__name__}: the process failed ({last})")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def machine() -> dict[str, Any]:
    """Processor, cores, memory and load of this machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch = sys.modules.get("torch")
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / (1 << 30), 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
        "threads": None if torch is None else torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that do the work."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }


def run_child(argv: Sequence[str]) -> None:
    """Call the function that `in_child` named and print what it gives."""
    name, function, arguments = json.loads(argv[0])
    module = __import__(name)
    print(json.dumps(getattr(module, function)(*arguments)))


if __name__ == "__main__":
    run_child(sys.argv[1:])
