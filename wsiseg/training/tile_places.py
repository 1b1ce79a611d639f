"""Where on a slide crops are drawn: its squares with tissue, which can be kept in files.

Knows no crops. Memory bound: beside the picture that tissue is found on, an eighth of a byte for
each of the slide's squares.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wsiseg.atomic import staged
from wsiseg.errors import OutputError, SlideError
from wsiseg.slides.slide import Slide
from wsiseg.slides.tissue import find_tissue

SIDE_UM = 32.0
"""About the side of a square. Tissue is found with a margin of 12 um around it, so that of the
thinnest that is found a square has more than LEAST, wherever the borders of squares lie."""
LEAST = 0.3
"""Share of the fullest square's tissue that a square needs more than."""
METHOD = 1
"""Version of how squares are found; what another one kept is not used."""
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)


class Places(NamedTuple):
    """Which squares of a slide have tissue, at least one.

    Attributes:
        packed: (n,) uint8: a bit for each square, row by row.
        shape: (rows, columns) of all squares.
        side: (x, y) of a square in level-0 pixels.
    """

    packed: npt.NDArray[np.uint8]
    shape: tuple[int, int]
    side: tuple[float, float]

    def marks(self) -> npt.NDArray[np.bool_]:
        """(rows, columns) bool: which squares have tissue."""
        count = self.shape[0] * self.shape[1]
        return np.unpackbits(self.packed, count=count).reshape(self.shape).view(np.bool_)

    def draw(self, rng: np.random.Generator | None) -> tuple[float, float]:
        """(x, y) in level-0 pixels: anywhere in any of the squares, alike; without `rng` the
        centre of the middle one. The last squares of a slide may reach beyond it."""
        held = np.flatnonzero(self.marks())
        number = held[len(held) // 2 if rng is None else rng.integers(len(held))]
        row, column = divmod(int(number), self.shape[1])
        x, y = (0.5, 0.5) if rng is None else rng.random(2)
        return float(column + x) * self.side[0], float(row + y) * self.side[1]


def find_places(slide: Slide) -> Places:
    """The squares of a slide with more than LEAST of the tissue of the one with the most, which is
    full of it on all slides but those of threads and crumbs.

    Raises:
        SlideError: the slide cannot be read, or has no tissue.
    """
    mask = find_tissue(slide, "auto").mask
    rows, columns = mask.shape
    step = max(1, round(SIDE_UM / (slide.size.width * slide.mpp / columns)))
    padded = np.pad(mask, ((0, -rows % step), (0, -columns % step)), mode="edge")
    shape = padded.shape[0] // step, padded.shape[1] // step
    shares = padded.reshape(shape[0], step, shape[1], step).mean(axis=(1, 3))
    marks = shares > shares.max() * LEAST
    if not marks.any():
        raise SlideError(f"{slide.path}: no tissue found on this slide")
    side = step * slide.size.width / columns, step * slide.size.height / rows
    return Places(np.packbits(marks), shape, side)


def kept_places(
    folder: Path | None, path: Path, mpp: float | None, find: Callable[[], Places]
) -> Places:
    """The places of a slide, from a file below `folder` if it was written of the same slide.

    Otherwise they are found, and kept if the folder can be written. Any number of processes may do
    so at once: a file that is damaged, or just being written, is made anew.

    Args:
        folder: where they are kept; None: nowhere.
        path: the slide; known by this path, its size and the time that it was changed.
        mpp: micrometres per pixel that its source gives it, if any.
        find: finds them.

    Raises:
        SlideError: as `find` does.
    """
    if folder is None:
        return find()
    name, status = json.dumps([str(path.resolve()), mpp]), path.stat()
    file = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    key = [METHOD, name, status.st_size, status.st_mtime_ns]
    with suppress(*_DAMAGED):
        return _parsed(json.loads(file.read_text()), key)
    places = find()
    text = json.dumps(
        {
            "key": key,
            "shape": places.shape,
            "side": places.side,
            "packed": base64.b64encode(places.packed.tobytes()).decode(),
        }
    )
    with suppress(OutputError), staged(file, durable=False) as (temporary,):
        temporary.write_text(text)
    return places


def _parsed(kept: Any, key: list[Any]) -> Places:
    """What a file says.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it is of another slide, or damaged.
    """
    if kept["key"] != key:
        raise ValueError("of another slide")
    (rows, columns), (x, y) = kept["shape"], kept["side"]
    packed = np.frombuffer(base64.b64decode(kept["packed"], validate=True), np.uint8)
    places = Places(packed, (int(rows), int(columns)), (float(x), float(y)))
    if len(packed) != -(-rows * columns // 8) or not places.marks().any():
        raise ValueError("damaged")
    return places
