"""Runs the rows and prints one table: target, measured, verdict; can put it into a document.

    python benchmarks/table.py --short
    python benchmarks/table.py --full --folder build/bench --write docs/performance.md

Every row is a command of its own and leaves its numbers in a JSON file in --folder. With --collect
nothing is run: the table is made of the files that are there. The document gets the table between
its markers; a row that was not run or whose outputs were not equal has no numbers there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import click
from shared import run, table

from wsiseg.atomic import staged
from wsiseg.errors import UsageError

FOLDER = Path(__file__).resolve().parent
BEGIN, END = "<!-- table begins -->", "<!-- table ends -->"


class Command(NamedTuple):
    """A row: its script and the words after it, for a quick look and for the targets' sizes."""

    script: str
    short: str
    full: str

    def words(self, *, full: bool) -> list[str]:
        """The words after the script."""
        return (self.full if full else self.short).split()


COMMANDS = {
    "sharing": Command("sharing.py", "--tiles 5", "--model full --tiles 5"),
    "head": Command("head.py", "", "--model full"),
    "literal": Command("literal.py", "", "--model full"),
    "overhead": Command("overhead.py", "--side 4096", "--side 8192"),
    "reading": Command(
        "reading_row.py", "--side 3072 --windows 16 --repeats 2", "--side 12288 --windows 256"
    ),
    "openvino": Command("runtimes.py", "--repeats 1", "--model glas-small"),
    "memory": Command(
        "memory.py",
        "--size 5120 5120 --size 5120 10240",
        "--size 20000 20000 --size 50000 50000 --size 50000 100000",
    ),
    "pyramid": Command("pyramid.py", "--size 16384 8192 --block 2048", ""),
    "polygons": Command("polygons.py", "--side 4096 --part 1024", "--size 50000 40000"),
}
HEAD = ("row", "equal", "quantity", "target", "measured", "verdict")


def run_row(name: str, folder: Path, *, full: bool, more: list[str]) -> None:
    """Run one row; its numbers go to `<folder>/<name>.json`, what it prints to the terminal."""
    path = folder / f"{name}.json"
    path.unlink(missing_ok=True)
    command = COMMANDS[name]
    words = [str(FOLDER / command.script), *command.words(full=full), *more, "--json", str(path)]
    subprocess.run([sys.executable, "-W", "ignore", *words], check=False)


def collected(folder: Path) -> list[dict[str, Any]]:
    """What the rows left in a folder, in the order of the table.

    Raises:
        UsageError: a file is not what a row writes.
    """
    found = []
    for path in (folder / f"{name}.json" for name in COMMANDS):
        if not path.is_file():
            continue
        try:
            result = json.loads(path.read_text())
            rows(result)
        except (ValueError, KeyError, TypeError) as e:
            raise UsageError(f"{path}: not the numbers of a row; run it again ({e})") from e
        found.append(result)
    return found


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The lines of the table of one row."""
    if not result["equal"]:
        return [[result["row"], "NO", result["compared"][-1], "equal", "not equal", "missed"]]
    if not result["judged"]:
        compared = "yes" if result["compared"] else "-"
        return [[result["row"], compared, "not judged at this size", "", "", ""]]
    return [
        [
            result["row"],
            "yes",
            judged["what"],
            f"{judged['sense']} {judged['target']:g}",
            f"{judged['measured']:.4g}",
            "met" if judged["met"] else "missed",
        ]
        for judged in result["judged"]
    ]


def machine_line(result: dict[str, Any]) -> str:
    """Machine, date and versions of a row in one line."""
    at, versions = result["machine"], result["versions"]
    parts = [
        result["date"],
        f"{at['cores']} cores {at['processor']}",
        f"{at['memory_gib']:g} GiB",
        f"load {at['load']:g}",
        *([f"{at['threads']} threads of torch"] if at["threads"] else []),
        *([at["gpu"]] if at["gpu"] else []),
        *(f"{name} {version}" for name, version in versions.items()),
    ]
    return ", ".join(parts)


def markdown(results: list[dict[str, Any]]) -> str:
    """The table of a document, and where each row was measured and with which command."""
    if not results:
        return "No row has been measured yet.\n"
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    lines += [f"| {' | '.join(row)} |" for result in results for row in rows(result)]
    lines += ["", "Each was measured by:", ""]
    for result in results:
        lines.append(f"- {result['row']}: `{result['command']}` ({machine_line(result)})")
    return "\n".join(lines) + "\n"


def write_into(path: Path, text: str) -> None:
    """Replace what is between the markers of a document.

    Raises:
        UsageError: it has no markers.
    """
    try:
        before, rest = path.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
    except (OSError, ValueError, IndexError) as e:
        raise UsageError(f"{path}: needs one {BEGIN} and one {END} to put the table between") from e
    with staged(path) as (temporary,):
        temporary.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


@click.command(help=__doc__.splitlines()[0])
@click.option("--short/--full", "short", default=True, help="Small sizes, or those of the targets.")
@click.option("--row", "names", multiple=True, type=click.Choice(list(COMMANDS)), help="Only this.")
@click.option("--collect", is_flag=True, help="Run nothing; take what is in the folder.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("build/bench"),
    show_default=True,
    help="For the numbers of the rows.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of torch, for every row.")
@click.option("--tiatoolbox", metavar="PYTHON", help="As of overhead.py.")
@click.option("--write", type=click.Path(path_type=Path), help="A document with markers.")
@click.option("--check", is_flag=True, help="Exit code 1 where a target is missed.")
def main(**words: Any) -> None:
    """Run, collect, print."""
    folder: Path = words["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    names = words["names"] or tuple(COMMANDS)
    for name in () if words["collect"] else names:
        more = ["--threads", str(words["threads"])] if words["threads"] else []
        if name == "overhead" and words["tiatoolbox"]:
            more += ["--tiatoolbox", words["tiatoolbox"]]
        run_row(name, folder, full=not words["short"], more=more)
    results = collected(folder)
    click.echo()
    click.echo(table(HEAD, [row for result in results for row in rows(result)]))
    for line in sorted({machine_line(result) for result in results}):
        click.echo(line)
    if words["write"]:
        write_into(words["write"], markdown(results))
    missing = [n for n in names if not (folder / f"{n}.json").is_file()]
    for name in missing:
        click.echo(f"{name}: left no numbers", err=True)
    unequal = not all(result["equal"] for result in results)
    if missing or unequal or (words["check"] and not all(r["passed"] for r in results)):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
