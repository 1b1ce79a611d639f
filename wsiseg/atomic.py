"""Files that appear under their final names only when all are complete. Knows no formats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsiseg.errors import OutputError


@contextmanager
def staged(*finals: Path, also: tuple[type[Exception], ...] = ()) -> Iterator[list[Path]]:
    """Temporary paths to write to, renamed to `finals` in that order when the block ends well.

    The temporary files lie in the folders of the final ones, under names that a later run
    replaces. If the block fails or is interrupted they are removed, and what was there under the
    final names stays as it was.

    Args:
        finals: the files.
        also: what a library raises, beside OSError, where it cannot write.

    Raises:
        OutputError: the folder or the files cannot be written (no space, no permission).
    """
    temporaries = [final.with_name(f".{final.name}.part") for final in finals]
    failures: tuple[type[Exception], ...] = (OSError, *also)
    try:
        for final in finals:
            final.parent.mkdir(parents=True, exist_ok=True)
        yield temporaries
        for temporary, final in zip(temporaries, finals, strict=True):
            temporary.replace(final)
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
