"""Whose a run folder is: the configuration that it was begun with. Knows no networks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wsiseg.atomic import staged
from wsiseg.config import difference, from_mapping, to_mapping
from wsiseg.errors import UsageError

WITHOUT_EFFECT = {
    "memory_gb",
    "cache_mb",
    "limit_gb",
    "log_every",
    "save_every",
    "measure_every",
    "licence",
}
"""Keys that change nothing of a run's weights; one that is resumed may have others."""


def essential(data: Any) -> Any:
    """A configuration, or plain data of one, as plain data without what has no effect."""
    plain = to_mapping(data)
    if not isinstance(plain, Mapping):
        return plain
    return {k: essential(v) for k, v in plain.items() if k not in WITHOUT_EFFECT}


def check_run(
    run: Path, config: Any, *, resume: bool, of: Callable[[Any], Any] = essential
) -> None:
    """Refuse to mix two runs in a folder.

    A run that ended before its first line of log or state (a missing data folder, say) is none.
    `of` gives of a configuration, as plain data, what must be the same.

    Raises:
        UsageError: the folder holds a run and `resume` is off, or that of another configuration.
    """
    begun = any((run / name).exists() for name in ("log.csv", "state.pt"))
    if begun and not resume:
        raise UsageError(f"{run}: holds a run already; give --resume or another --out")
    if begun and (other := _other_key(run / "config.json", config, of)):
        raise UsageError(
            f"{run}: was started with another configuration ({other}); use another --out, and to"
            " train further give its model as the start of a new run"
        )


def claim_run(
    run: Path, config: Any, *, resume: bool, of: Callable[[Any], Any] = essential
) -> None:
    """Make a run folder and keep its configuration in it, if `check_run` has nothing against it.

    Raises:
        UsageError: as of `check_run`.
        OutputError: the folder cannot be written.
    """
    check_run(run, config, resume=resume, of=of)
    with staged(run / "config.json") as (temporary,):
        temporary.write_text(json.dumps(to_mapping(config), indent=1))


def _other_key(record: Path, config: Any, of: Callable[[Any], Any]) -> str:
    """The first key of a configuration that is not as a file holds it, empty if none; keys that
    the file lacks have their defaults."""
    try:
        held = from_mapping(type(config), json.loads(record.read_text()))
    except (OSError, ValueError):  # missing, damaged, or of another kind
        return f"{record.name} cannot be read as one of its kind"
    return difference(of(held), of(config))
