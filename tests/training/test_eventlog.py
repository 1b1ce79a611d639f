from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog

from wsiseg.errors import OutputError
from wsiseg.training.eventlog import EventLog


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def events(run: Path) -> list[Any]:
    """All events of a run, in the order in which TensorBoard reads the files."""
    found = []
    for path in sorted((run / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,), crc = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])[0]
            body = data[12 : 12 + length]
            assert crc == masked(data[:8])
            assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked(body)
            found.append(Event.FromString(body))
            data = data[16 + length :]
    return found


def shown(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars by tag as TensorBoard shows them: a start drops what is at its step and after."""
    values: dict[str, list[tuple[int, float]]] = {}
    for event in events(run):
        if event.session_log.status == SessionLog.START:
            values = {t: [p for p in ps if p[0] < event.step] for t, ps in values.items()}
        for value in event.summary.value:
            values.setdefault(value.tag, []).append((event.step, value.simple_value))
    return values


def test_scalars_are_read_back(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.scalars("training", {"step": 10, "loss": 0.5, "learning_rate": 0.25})
        log.scalars("validation", {"step": 10, "dice": 0.75})
        assert shown(tmp_path)["validation/dice"] == [(10, 0.75)]  # at once, before the end
    assert shown(tmp_path) == {
        "training/loss": [(10, 0.5)],
        "training/learning_rate": [(10, 0.25)],
        "validation/dice": [(10, 0.75)],
    }
    assert events(tmp_path)[0].file_version == "brain.Event:2"
    assert not any(e.session_log.status for e in events(tmp_path))


def test_a_resumed_run_does_not_double_rows(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.scalars("training", {"step": step, "loss": 8.0 - step})
    with EventLog(tmp_path, first_step=3) as log:
        for step in (3, 4, 5):
            log.scalars("training", {"step": step, "loss": 1.0 * step})
    assert shown(tmp_path)["training/loss"] == [(1, 7.0), (2, 6.0), (3, 3.0), (4, 4.0), (5, 5.0)]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        EventLog(tmp_path / "file")


def test_a_full_disk_is_an_error_of_the_call(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    log = EventLog(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(log._writer, "flush", full)
        with pytest.raises(OutputError, match="No space left"):
            log.scalars("training", {"step": 1, "loss": 1.0})
    log.close()
