"""Files that appear under their final names only when all are complete. Knows no formats.

What has its final name is on the disk, not only in the memory of the system: files before they are
renamed, names after it. Some file systems say only then that there is no room.
"""

from __future__ import annotations

import glob
import os
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wsiseg.errors import OutputError

_MARK_BYTES = 4


@contextmanager
def staged(
    *finals: Path,
    also: tuple[type[Exception], ...] = (),
    stale: Collection[Path] = (),
    durable: bool = True,
    check: Callable[[], None] | None = None,
) -> Iterator[list[Path]]:
    """Temporary paths to write to, renamed to `finals` in that order when the block ends well.

    The temporary files lie in the folders of the final ones, under names that a later run
    replaces. If the block fails or is interrupted they are removed, and what was there under the
    final names stays as it was.

    Args:
        finals: the files.
        also: what a library raises, beside OSError, where it cannot write.
        stale: files that must not stand beside some of the new ones: removed before the first gets
            its name.
        durable: whether a loss of power must not cost the files; without it they are in the hands
            of the system, as for a cache.
        check: where a lock must be held: raises if it is not, and is called before the first file
            gets its name. Temporary names are then of this call alone, and what earlier holders of
            the lock left under theirs is removed.

    Raises:
        OutputError: the folder or the files cannot be written (no space, no permission).
    """
    mark = "" if check is None else f".{secrets.token_hex(_MARK_BYTES)}"
    temporaries = [final.with_name(f".{final.name}{mark}.part") for final in finals]
    failures: tuple[type[Exception], ...] = (OSError, *also)
    try:
        for final in finals:
            final.parent.mkdir(parents=True, exist_ok=True)
            if check is not None:
                _sweep(final)
        yield temporaries
        for temporary in temporaries if durable else ():
            sync_file(temporary)
        if check is not None:
            check()
        for path in stale:
            path.unlink(missing_ok=True)
        for temporary, final in zip(temporaries, finals, strict=True):
            temporary.replace(final)
        for folder in {final.parent for final in finals} if durable else ():
            sync_folder(folder)
    except failures as e:
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())
        raise OutputError(
            f"{finals[0].parent}: cannot write ({reason}); "
            "check free space and permissions or choose another folder"
        ) from e
    finally:
        for temporary in temporaries:
            try:
                temporary.unlink(missing_ok=True)
            except OSError:
                continue  # the error that led here says more


def _sweep(final: Path) -> None:
    """Remove the marked temporary files of a file, and those that were made beside them."""
    name = f"{glob.escape(final.name)}.{'[0-9a-f]' * (2 * _MARK_BYTES)}.part"
    for pattern in (f".{name}", f"..{name}.part"):
        for left in final.parent.glob(pattern):
            left.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Have the disk take what was written to a file.

    Raises:
        OSError: it does not.
    """
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Have the disk take the names in a folder, where the system can be asked for that."""
    if os.name != "posix":
        return
    with suppress(OSError):  # some file systems cannot: the files are whole, their names follow
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def sync_tree(path: Path) -> None:
    """Have the disk take a folder with all that is in it.

    Raises:
        OSError: it does not.
    """
    for entry in path.iterdir():
        if entry.is_dir():
            sync_tree(entry)
        else:
            sync_file(entry)
    sync_folder(path)
