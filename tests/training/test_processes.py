"""How the processes of a run are connected."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch

from wsiseg.errors import UsageError
from wsiseg.training.processes import PATIENCE, device_of_process


@pytest.mark.parametrize(
    ("name", "processes", "device", "connected"),
    [
        ("cpu", 2, "cpu", [{"cpu": True, "timeout": PATIENCE}]),
        ("auto", 2, "cuda:1", []),
        ("cuda", 2, "cuda:1", []),
        ("cpu", 1, "cpu", []),
        ("auto", 1, "auto", []),
        ("cuda:1", 1, "cuda:1", []),
    ],
)
def test_processes_on_cpus_are_connected_as_such_beside_a_gpu(
    name: str,
    processes: int,
    device: str,
    connected: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(accelerate, "PartialState", lambda **options: asked.append(options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of_process(name) == device
    assert asked == connected


def test_one_gpu_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"cuda:0: one GPU for several processes; .*device cuda"):
        device_of_process("cuda:0")
