"""Scalars of a run as TensorBoard events. Knows no networks.

Events are written at once and in this thread, so that a full disk is an error of the call and
not a queue that waits for a writer that is gone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from wsiseg.errors import OutputError


class EventLog:
    """The event file of one start of a run, in `run/tensorboard/`."""

    def __init__(self, run: str | Path, *, first_step: int = 1) -> None:
        """Begin an event file.

        Args:
            run: the run's folder.
            first_step: the first step that will be written; where it is not 1, TensorBoard is
                told to drop what an interrupted run wrote at that step and after it.

        Raises:
            OutputError: the folder cannot be written.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self.folder = Path(run) / "tensorboard"
        self._event = event_pb2.Event
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            suffix = f".from{first_step:09d}"
            self._writer: Any = EventsWriter(str(self.folder / "events"), suffix)
        except OSError as e:
            raise self._failure(e) from e
        if first_step > 1:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(step=first_step, session_log=start))

    def scalars(self, group: str, row: Mapping[str, float]) -> None:
        """Write a row of a table as `group/name`, at its `step`.

        Args:
            group: heading in TensorBoard, such as training or validation.
            row: `step` and the values, as they go into the CSV file.

        Raises:
            OutputError: the file cannot be written.
        """
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=f"{group}/{name}", simple_value=value)
            for name, value in row.items()
            if name != "step"
        ]
        self._write(self._event(step=int(row["step"]), summary=Summary(value=values)))

    def close(self) -> None:
        """End the file."""
        try:
            self._writer.close()
        except OSError as e:
            raise self._failure(e) from e

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as e:
            raise self._failure(e) from e

    def _failure(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.folder}: cannot write ({error.strerror or error}); "
            "check free space and permissions or choose another folder"
        )
