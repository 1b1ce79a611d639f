"""Foreign torch files are read without running what they hold, unless the caller asks for it."""

from __future__ import annotations

import argparse
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from wsiseg.errors import CheckpointError
from wsiseg.models.torchfile import read_torch, tensors_of


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


class Harmless:
    """An object of a class that is not a tensor."""

    def __init__(self, value: int) -> None:
        self.value = value


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_come_back(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "a.ckpt"
    data = {"state_dict": {"w": torch.arange(4.0)}, "args": argparse.Namespace(a=1), "epoch": 3}
    torch.save(data, file, _use_new_zipfile_serialization=zipped)
    found = read_torch(file)
    assert torch.equal(found["state_dict"]["w"], torch.arange(4.0))
    assert found["args"].a == 1
    assert list(tensors_of({**found["state_dict"], "epoch": 3})) == ["w"]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    file, mark = tmp_path / "a.ckpt", tmp_path / "ran"
    torch.save({"w": Trap(mark)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"can run any code; .* add --allow-pickle"):
        read_torch(file)
    assert not mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_the_explicit_way_reads_other_objects(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "a.ckpt"
    torch.save(
        {"w": torch.ones(2), "object": Harmless(7)}, file, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        read_torch(file)
    found = read_torch(file, allow_pickle=True)
    assert found["object"].value == 7
    assert torch.equal(found["w"], torch.ones(2))


def test_objects_of_packages_that_are_not_installed(tmp_path: Path) -> None:
    """As in Lightning's checkpoints, whose callbacks are keyed by class."""
    module = types.ModuleType("absent_lightning")
    kind = type("ModelCheckpoint", (Harmless,), {"__module__": "absent_lightning"})
    module.__dict__["ModelCheckpoint"] = kind
    sys.modules["absent_lightning"] = module
    file = tmp_path / "a.ckpt"
    try:
        torch.save({"w": torch.ones(2), "callbacks": {kind: kind(3)}}, file)
    finally:
        del sys.modules["absent_lightning"]
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        read_torch(file)
    assert torch.equal(read_torch(file, allow_pickle=True)["w"], torch.ones(2))


@pytest.mark.parametrize("allow_pickle", [True, False])
def test_files_that_are_none(tmp_path: Path, allow_pickle: bool) -> None:
    whole, file = tmp_path / "whole.ckpt", tmp_path / "a.ckpt"
    torch.save({"w": torch.ones(1000)}, whole)
    for content, message in (
        (b"", "the file is empty"),
        (b"<html>", "not a torch checkpoint"),
        (whole.read_bytes()[:2000], "damaged or truncated"),
        (pickle.dumps([1, 2], protocol=2), "damaged"),
        (pickle.dumps({"w": 1}, protocol=2)[:-5], "damaged"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            read_torch(file, allow_pickle=allow_pickle)
        assert "\n" not in str(caught.value)
    torch.save([torch.ones(2)], file)
    with pytest.raises(CheckpointError, match="holds a list, not a mapping"):
        read_torch(file, allow_pickle=allow_pickle)
    with pytest.raises(CheckpointError, match="no such file"):
        read_torch(tmp_path / "none", allow_pickle=allow_pickle)
