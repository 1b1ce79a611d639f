"""How large a configuration may say that a network is, and why. Knows no particular network.

A checkpoint's header or a YAML of a hundred bytes can ask for networks that take terabytes, or
hours to lay out. What no network has is refused before anything is built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from wsiseg.errors import ConfigError

MAX_NUMBER = 1 << 20
"""Any whole number: a width, a side, a count. The widest layers in use have tens of thousands."""
MAX_ITEMS = 256
"""Entries of a list: levels, timesteps, taps."""
MAX_REPEATS = 64
"""Blocks of a level or members of an ensemble, each of which takes time to make."""
MAX_SIDE_PX = 8192
"""Side of a window or a tile, which is held whole with its features: 10 times the usual."""
_REPEATS = ("depth", "layers", "members")
_SIDES = ("tile_px",)


def check_sizes(data: Any, where: str) -> None:
    """Refuse numbers that no network has, anywhere in plain data.

    Args:
        data: a configuration as of `to_mapping`.
        where: dotted path of it, for messages.

    Raises:
        ConfigError: a number that is too large or not finite, a list that is too long.
    """
    if isinstance(data, Mapping):
        for key, value in data.items():
            check_sizes(value, f"{where}.{key}")
    elif isinstance(data, list | tuple):
        if len(data) > MAX_ITEMS:
            raise ConfigError(f"{where}: {len(data)} entries; no network has over {MAX_ITEMS}")
        for value in data:
            check_sizes(value, where)
    elif isinstance(data, float):
        if not math.isfinite(data):
            raise ConfigError(f"{where}: {data} is not a finite number")
    elif isinstance(data, int):
        low, high = _range(where.rpartition(".")[2])
        if not low <= data <= high:
            shown = data if data.bit_length() <= 64 else f"of {data.bit_length()} bits"
            raise ConfigError(f"{where} {shown}: must be from {low} to {high}")


def _range(key: str) -> tuple[int, int]:
    if key in _REPEATS:
        return 1, MAX_REPEATS
    return (1, MAX_SIDE_PX) if key in _SIDES else (-MAX_NUMBER, MAX_NUMBER)


def check_window(window_px: int, tile_px: int, resize_px: int | None) -> None:
    """Refuse windows that are not made of tiles, and sides that cannot be held in memory.

    Raises:
        ConfigError: as said.
    """
    if window_px <= 0 or window_px % tile_px:
        raise ConfigError(f"window_px {window_px}: must be a multiple of the tile, {tile_px}")
    for name, side in (("window_px", window_px), ("resize_px", resize_px)):
        if side is not None and not 0 < side <= MAX_SIDE_PX:
            raise ConfigError(f"{name} {side}: must be from 1 to {MAX_SIDE_PX}")


@contextmanager
def buildable(what: str) -> Iterator[None]:
    """Networks whose sizes do not fit one another, or memory, as an error of the configuration.

    torch, diffusers and timm say so while they build, each in its way.

    Raises:
        ConfigError: they said so.
    """
    try:
        yield
    except ConfigError:
        raise
    except (RuntimeError, ValueError, TypeError, ArithmeticError, AssertionError, MemoryError) as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ConfigError(f"{what}: no network can be built like this ({reason})") from e
