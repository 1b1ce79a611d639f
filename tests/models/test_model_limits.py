"""Checkpoints and configurations that ask for what no network has."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from wsiseg.errors import CheckpointError, ConfigError
from wsiseg.models.checkpoint import load_model, save_checkpoint
from wsiseg.models.describe import describe
from wsiseg.models.registry import build_extractor

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_checkpoint(path, tiny_model("stain", "fcn"), card={}, licence="CC0-1.0")
    return path


def changed(good: Path, folder: Path, change: Change) -> Path:
    """The checkpoint with other metadata."""
    data = good.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["wsiseg"])
    change(metadata)
    header["__metadata__"]["wsiseg"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    path = folder / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("head", {"widths": [10**9, 8, 8]}, r"head\.widths 1000000000: must be from"),
        ("head", {"widths": [0, 8, 8]}, "widths .* positive"),
        ("extractor", {"tile_px": 0}, r"extractor\.tile_px 0: must be from 1 to 8192"),
        ("extractor", {"name": "hipt", "encoder": {"depth": 10**6}}, "depth 1000000: must be"),
        ("extractor", {"name": "ddpm", "timesteps": list(range(1000))}, "1000 entries"),
        ("extractor", {"name": "ddpm", "schedule": {"steps": 10**9}}, "steps 1000000000: must"),
        (
            "extractor",
            {"name": "genselfdiff", "dim": 2**20, "mults": [1, 2**20], "tile_px": 32},
            "no network",
        ),
    ],
)
def test_sizes_that_no_network_has(
    good: Path, tmp_path: Path, part: str, settings: dict[str, Any], message: str
) -> None:
    def change(metadata: dict[str, Any]) -> None:
        own = {} if "name" in settings else metadata["config"][part]
        metadata["config"][part] = {**own, **settings}

    began = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        load_model(changed(good, tmp_path, change), device="cpu")
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    "card",
    [
        {"dataset": 5},
        {"training_images": "abc"},
        {"training_images": [1]},
        {"training_contents": [1]},
        {"pretraining": []},
    ],
)
def test_cards_whose_parts_are_not_as_written(
    good: Path, tmp_path: Path, card: dict[str, Any]
) -> None:
    path = changed(good, tmp_path, lambda m: m.update(card=card))
    with pytest.raises(CheckpointError, match="a card that wsiseg did not write"):
        load_model(path, device="cpu")


def test_nesting_without_end(good: Path, tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(200):
        deep = {"a": deep}
    with pytest.raises(CheckpointError, match="nested deeper"):
        describe(changed(good, tmp_path, lambda m: m.update(card=deep)))


@pytest.mark.parametrize("end", ["9" * 4300, "1e99", "NaN", "-9", "true"])
def test_places_that_cannot_be(tmp_path: Path, end: str) -> None:
    text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + end.encode() + b"]}}"
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(CheckpointError):
        load_model(path, device="cpu")


def test_weights_that_are_no_numbers(good: Path, tmp_path: Path) -> None:
    tensors = load_file(good)
    data = good.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    about = json.loads(data[8 : 8 + length])["__metadata__"]
    for change, message in (("nan", "not finite"), ("whole", "torch.int64, not")):
        name = "head.classifier.bias"
        wrong = tensors[name] * float("nan") if change == "nan" else tensors[name].long()
        path = tmp_path / "m.safetensors"
        save_file({**tensors, name: wrong}, path, metadata=about)
        with pytest.raises(CheckpointError, match=f"{name} is {message}"):
            load_model(path, device="cpu")


def test_what_does_not_build_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="no network can be built like this"):
        build_extractor({"name": "genselfdiff", "dim": 2**20, "mults": [1, 2**20]})


def test_a_number_too_long_to_be_written_is_told_by_its_length() -> None:
    with pytest.raises(ConfigError, match=r"dim of 20001 bits: must be from"):
        build_extractor({"name": "genselfdiff", "dim": 1 << 20_000})
