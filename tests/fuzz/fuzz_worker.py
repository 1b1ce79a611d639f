"""The process that makes inputs and tries them, one after the other, under a limit of memory.

Started by run.py with a JSON object on the command line. Writes a JSON line before and after each
input, so that whoever reads them knows which one ended the process.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz_case import Case, Offence, check_refusal, files_below

from wsiseg.errors import WsisegError

MEMORY = 3 << 30
"""Bytes of address space that inputs may take beside the libraries."""
SECONDS = 20.0
"""Processor seconds that one input may take."""


class TooLong(BaseException):
    """An input took more than its seconds."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong(f"more than {SECONDS:g} s of processor time")


def limit_memory() -> None:
    """From now on this process can take no more than MEMORY beside what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def attempt(case: Case, folder: Path) -> tuple[str, str]:
    """What became of an input: (accepted, refused or offending; what it said)."""
    before = files_below(folder)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        case.run()
        result = ("accepted", "")
    except WsisegError as e:
        try:
            check_refusal(e)
            result = ("refused", str(e))
        except Offence:
            result = ("offending", traceback.format_exc())
    except (Exception, TooLong):
        result = ("offending", traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    after = files_below(folder)
    if after != before:
        changed = sorted(set(before.items()) ^ set(after.items()))
        return "offending", f"files changed outside the output folder: {changed[:5]}"
    return result


def say(**what: Any) -> None:
    """One JSON line to whoever started this process."""
    os.write(3, (json.dumps(what) + "\n").encode())


def main() -> None:
    """Try inputs first .. stop - 1 of a kind, all made from (seed, kind, number)."""
    job = json.loads(sys.argv[1])
    work = Path(job["folder"]).resolve()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _too_long)
    maker: Any = importlib.import_module(f"fuzz_{job['kind']}").Maker(work / "seeds")
    limit_memory()
    for number in range(job["first"], job["stop"]):
        folder = work / "case"
        folder.mkdir()
        os.chdir(folder)
        case = maker.make(random.Random(f"{job['seed']}/{job['kind']}/{number}"), folder)
        say(begin=number, what=case.what)
        result, text = attempt(case, folder)
        if result == "offending":
            shutil.move(folder, work / f"offending-{number}")
        else:
            shutil.rmtree(folder)
        say(end=number, result=result, text=text)


if __name__ == "__main__":
    main()
