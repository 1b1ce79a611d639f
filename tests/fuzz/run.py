"""Tries damaged and hostile inputs on wsiseg, for as long as is asked.

    python tests/fuzz/run.py --seconds 600 --seed 1 --kind slides

Every input is made from (seed, kind, number) alone. Each must be taken, or refused with one clear
line; what is not is kept with its traceback in a folder. Works on Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KINDS = ("slides", "checkpoints", "tables", "yaml", "geojson")
SILENCE = 300.0
"""Seconds without a word after which a process is taken for hung."""
START = 600.0
"""Seconds that it may take to start."""


@dataclass
class Tally:
    """What became of the inputs of a kind."""

    counts: Counter[str] = field(default_factory=Counter)
    offences: list[tuple[int, str, str]] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        """Inputs that were tried."""
        return self.counts.total()


def fuzz(kind: str, *, seed: int, count: int, seconds: float, folder: Path) -> Tally:
    """Try up to `count` inputs of a kind for about `seconds`.

    Args:
        kind: one of KINDS.
        seed: with the kind and the number of an input it decides the input.
        count: inputs.
        seconds: no input is begun after these; starting a process is not counted.
        folder: for seeds and for what offends; made if missing.
    """
    tally, number = Tally(), 0
    folder.mkdir(parents=True, exist_ok=True)
    while number < count and tally.seconds < seconds:
        number = _session(kind, seed, (number, count), seconds, folder, tally)
    shutil.rmtree(folder / "seeds", ignore_errors=True)
    shutil.rmtree(folder / "case", ignore_errors=True)
    return tally


def _session(
    kind: str, seed: int, span: tuple[int, int], seconds: float, folder: Path, tally: Tally
) -> int:
    """Run a worker until it is done, the time is up, or an input ends it; the next number."""
    shutil.rmtree(folder / "seeds", ignore_errors=True)
    shutil.rmtree(folder / "case", ignore_errors=True)
    (folder / "seeds").mkdir()
    job = {"kind": kind, "seed": seed, "first": span[0], "stop": span[1], "folder": str(folder)}
    read, write = os.pipe()
    log = folder / "worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "fuzz_worker.py"), json.dumps(job)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _search_path()},
            stdout=output,
            stderr=output,
            preexec_fn=lambda: os.dup2(write, 3),
            pass_fds=(3,),
        )
    os.close(write)
    current: tuple[int, str] | None = None
    number, began = span[0], 0.0
    try:
        for event in _events(read, process):
            if "begin" in event:
                current = event["begin"], event["what"]
                began = began or time.perf_counter()
                continue
            assert current is not None
            number = event["end"] + 1
            tally.counts[event["result"]] += 1
            if event["result"] == "offending":
                _keep(folder, current, event["text"], tally)
            elif event["text"]:
                tally.refusals[_shape(event["text"])] += 1
            current = None
            if tally.seconds + time.perf_counter() - began > seconds:
                return number
    finally:
        os.close(read)
        process.kill()
        code = process.wait()
        tally.seconds += time.perf_counter() - began if began else 0.0
    if current is not None:
        tally.counts["offending"] += 1
        shutil.move(folder / "case", folder / f"offending-{current[0]}")
        _keep(folder, current, f"the process ended ({code}) or hung\n{_tail(log)}", tally)
        return current[0] + 1
    if number < span[1]:
        raise RuntimeError(f"the process for {kind} ended by itself ({code}):\n{_tail(log)}")
    return number


def _search_path() -> str:
    known = [str(HERE), str(HERE.parent / "models"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(p for p in known if p)


def _events(read: int, process: subprocess.Popen[bytes]) -> Any:
    """The worker's JSON lines, until it ends or says nothing for too long."""
    patience, rest = START, b""
    with selectors.DefaultSelector() as selector:
        selector.register(read, selectors.EVENT_READ)
        while selector.select(patience):
            data = os.read(read, 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield json.loads(line)
            patience = SILENCE


def _keep(folder: Path, current: tuple[int, str], text: str, tally: Tally) -> None:
    number, what = current
    (folder / f"offending-{number}.txt").write_text(f"{what}\n\n{text}", encoding="utf-8")
    tally.offences.append((number, what, text))


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def _shape(message: str) -> str:
    """A message without its names and numbers, to count alike ones together."""
    text = "".join("#" if c.isdigit() else c for c in message.partition(": ")[2] or message)
    return text[:70]


def main() -> None:
    """Fuzz from the command line; exit code 1 where some input offends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60, help="time, shared by the kinds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, action="append", help="one kind; all if not given")
    parser.add_argument("--count", type=int, default=10**9, help="inputs of each kind at most")
    parser.add_argument("--out", type=Path, default=Path("fuzz-out"), help="for what offends")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker ends, too
    parser.add_argument("--refusals", action="store_true", help="count the messages, too")
    options = parser.parse_args()
    kinds = options.kind or list(KINDS)
    bad = 0
    for kind in kinds:
        tally = fuzz(
            kind,
            seed=options.seed,
            count=options.count,
            seconds=options.seconds / len(kinds),
            folder=options.out / kind,
        )
        counts = tally.counts
        print(
            f"{kind:<12} {tally.tried:>7} tried  {counts['accepted']:>7} accepted  "
            f"{counts['refused']:>7} refused  {counts['offending']:>4} offending  "
            f"{tally.seconds:>6.0f} s",
            flush=True,
        )
        for text, count in tally.refusals.most_common() if options.refusals else ():
            print(f"    {count:>6}  {text}")
        for number, what, text in tally.offences:
            last = text.strip().splitlines()[-1] if text.strip() else ""
            print(f"    {number}: {what}: {last[:160]}")
        bad += len(tally.offences)
    if bad:
        print(f"{bad} offending inputs are in {options.out}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
