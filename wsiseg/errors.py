"""The exceptions of wsiseg, and the exit code each one means. Knows nothing else.

    WsisegError                 anything that went wrong; one clear line, exit code 1
    ├── UsageError              the caller asked for something that cannot be; exit code 2
    │   └── ConfigError         a configuration key or value that cannot be
    ├── SlideError              a slide that cannot be used
    │   ├── ResolutionError     mpp unknown, absurd or different along x and y
    │   └── SlideReadError      pixels that cannot be read
    ├── ModelError              a model that cannot be built or does not fit
    │   └── CheckpointError     a weights file that is not what was expected
    │       └── MissingCheckpointError  there is none of that name; a UsageError, too
    ├── DatasetError            labelled images that are missing or malformed
    ├── CanvasError             a canvas that is incomplete, foreign or damaged
    ├── OutputError             a file that cannot be written
    ├── DeviceMemoryError       a device without the memory for the least that can be computed
    └── LeaseLostError          a lock that another process has taken over

A message says what is wrong and what to do, in one line without a trailing full stop. It is one
line whatever the file or the name holds that it speaks of: control characters are written as
escapes, and what is too long is cut.
"""

from __future__ import annotations

_LONGEST = 2000
"""Characters of a message; a path may have 4096, but one that long says nothing."""


class WsisegError(Exception):
    """Base of every error that wsiseg raises on purpose."""

    exit_code = 1

    def __str__(self) -> str:
        """The message as one printable line."""
        text = super().__str__()
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class UsageError(WsisegError, ValueError):
    """The request itself cannot be carried out (wrong argument, missing input)."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration key is unknown or its value has the wrong type or range."""


class SlideError(WsisegError):
    """A slide cannot be opened or used."""


class ResolutionError(SlideError):
    """The slide's micrometres per pixel are unknown, absurd or anisotropic."""


class SlideReadError(SlideError):
    """Pixels of an open slide cannot be read."""


class ModelError(WsisegError):
    """A model cannot be built, found or used as asked."""


class CheckpointError(ModelError):
    """A weights file is missing, damaged or of another format."""


class MissingCheckpointError(UsageError, CheckpointError):
    """There is no weights file of that name."""


class DatasetError(WsisegError):
    """A dataset is missing or is not laid out as expected."""


class CanvasError(WsisegError):
    """A canvas is incomplete, belongs to something else or is damaged."""


class OutputError(WsisegError):
    """An output cannot be written."""


class DeviceMemoryError(WsisegError):
    """A device has no memory for even one tile or window."""


class LeaseLostError(WsisegError):
    """A lock is another process's by now: this one stood still for longer than its lease."""
