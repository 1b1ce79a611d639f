"""Hostile checkpoints: damaged safetensors files, bombs in header and metadata, pickles."""

from __future__ import annotations

import copy
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz_bytes import NUMBERS, damage
from fuzz_case import Case, Offence, command
from tiny_models import tiny_extractor, tiny_model

from wsiseg.errors import CheckpointError
from wsiseg.models.checkpoint import load_extractor, load_model, save_checkpoint, save_extractor
from wsiseg.models.storage import KEY
from wsiseg.models.torchfile import read_torch

MODELS = (
    *(("pathsegdiff", "fcn"), ("stain", "threshold"), ("genselfdiff", "linear")),
    *(("ddpm", "pixel_mlp"), ("cnn", "unet"), ("cnn, VGG", "fcn8"), ("hipt", "fcn")),
)
ODD: tuple[Any, ...] = (
    *(None, True, "", "x", "nan", [], {}, [[]], -1, 0.5, 1e308, float("nan"), float("inf")),
    *(10**9, 10**18, 10**400, "9" * 5000, [0] * 1000, list(range(10**5)), {"a": {"b": [1]}}),
    *("../../etc/passwd", "a\nb", "\x1b[2J", *NUMBERS),
)
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "Q9", "")


class _Payload:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("pwned"), "by a pickle"))


class Maker:
    """Makes checkpoints from the good ones that it writes first."""

    def __init__(self, seeds: Path) -> None:
        self.files: dict[str, bytes] = {}
        card = {"dataset": {"name": "glas"}, "training_images": ["a"], "metrics": {"dice": 0.5}}
        for extractor, head in MODELS:
            path = seeds / f"{extractor}-{head}.safetensors"
            model = tiny_model(extractor, head)
            save_checkpoint(path, model, card=card, licence="CC0-1.0")
            self.files[path.name] = path.read_bytes()
        path = seeds / "extractor.safetensors"
        save_extractor(path, tiny_extractor(), card=card, licence="CC0-1.0")
        self.files[path.name] = path.read_bytes()
        torch.save({"state_dict": {"a": torch.zeros(3)}}, seeds / "good.pt")
        torch.save({"state_dict": _Payload()}, seeds / "bad.pt")
        self.torch = [(seeds / n).read_bytes() for n in ("good.pt", "bad.pt")]
        self.torch += [pickle.dumps(_Payload(), protocol=p) for p in (0, 2, 4)]

    def make(self, rng: random.Random, folder: Path) -> Case:
        """A checkpoint, most of which are whole but for what their header says."""
        name = rng.choice(sorted(self.files))
        data, roll = self.files[name], rng.random()
        if roll < 0.12:
            return self._pickle(rng, folder)
        if roll < 0.25:
            return _use(rng, folder, damage(data, rng), f"{name}: damaged bytes")
        if roll < 0.33:
            header = _bomb(rng)
            return _use(rng, folder, struct.pack("<Q", len(header)) + header, "header bomb")
        length = struct.unpack("<Q", data[:8])[0]
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        change = rng.choice((_change_tensor, _change_metadata, _change_metadata, _change_config))
        what = change(header, rng) if change is not _change_config else _several(header, rng)
        text = json.dumps(header).encode("utf-8", "replace")
        return _use(rng, folder, struct.pack("<Q", len(text)) + text + body, f"{name}: {what}")

    def _pickle(self, rng: random.Random, folder: Path) -> Case:
        data = rng.choice(self.torch)
        if rng.random() < 0.6:
            data = damage(data, rng)
        path = folder / rng.choice(("m.pt", "m.safetensors", "m.ckpt"))
        path.write_bytes(data)
        if rng.random() < 0.1:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("archive/data.pkl", pickle.dumps(_Payload()))
                archive.writestr("archive/data/0", bytes(1 << 26))

        def run() -> None:
            try:
                load_model(path, device="cpu")
            except CheckpointError:
                read_torch(path)
                return
            raise Offence("a pickle was taken for a model")

        return Case("pickle", run)


def _use(rng: random.Random, folder: Path, data: bytes, what: str) -> Case:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    roll = rng.random()
    if roll < 0.15:
        return Case(f"show, {what}", lambda: _show(path))
    if roll < 0.3:
        return Case(f"extractor, {what}", lambda: _run(load_extractor, path))
    return Case(what, lambda: _run(load_model, path))


def _run(load: Callable[..., Any], path: Path) -> None:
    load(path, device="cpu")


def _show(path: Path) -> None:
    command("models", "show", path, *(["--json"] if path.stat().st_size % 2 else []))


def _change_tensor(header: dict[str, Any], rng: random.Random) -> str:
    """Another shape, dtype, place or name of a tensor."""
    names = [n for n in header if n != "__metadata__"]
    name = rng.choice(names)
    what = rng.choice(("shape", "dtype", "data_offsets", "name", "missing", "entry"))
    if what == "shape":
        header[name]["shape"] = rng.choice(([-1], [10**9, 10**9], [2**63], [1e400], "x", None))
    elif what == "dtype":
        header[name]["dtype"] = rng.choice(DTYPES)
    elif what == "data_offsets":
        header[name]["data_offsets"] = rng.choice(
            ([0, 0], [0, 2**62], [5, 1], [-4, 4], None, [0], [0, 10**4299], [0, float("nan")], "ab")
        )
    elif what == "name":
        header[rng.choice(("../x", "", "a" * 10**5, "extractor.", "head.\n"))] = header.pop(name)
    elif what == "missing":
        del header[name]
    else:
        header[name] = rng.choice(ODD)
    return f"{what} of {name}"


def _change_metadata(header: dict[str, Any], rng: random.Random) -> str:
    """Another value anywhere in the metadata, or metadata that are not JSON."""
    text = header["__metadata__"][KEY]
    if rng.random() < 0.2:
        deep = "[" * 900 + "]" * 900
        header["__metadata__"][KEY] = rng.choice(
            ("", "{", "null", "[]", text[:-1], deep, text.replace("{", '{"a":' + deep + ",", 1))
        )
        return "metadata that are not ours"
    if rng.random() < 0.05:
        header["__metadata__"] = rng.choice(ODD)
        return "no metadata"
    metadata = json.loads(text)
    key = rng.choice((*metadata, "card", "card", "config"))
    node: Any = metadata
    while isinstance(node[key], dict) and node[key] and rng.random() < 0.7:
        node = node[key]
        key = rng.choice(sorted(node))
    node[key] = rng.choice(ODD)
    header["__metadata__"][KEY] = json.dumps(metadata)
    return f"{key} = {str(node[key])[:40]!r}"


def _several(header: dict[str, Any], rng: random.Random) -> str:
    return ", ".join(_change_config(header, rng) for _ in range(rng.choice((1, 1, 2))))


def _change_config(header: dict[str, Any], rng: random.Random) -> str:
    """An absurd number or list in the configuration, of the type that belongs there."""
    metadata = json.loads(header["__metadata__"][KEY])
    node: Any = (
        metadata["config"][rng.choice(("extractor", "head", "extractor"))]
        if ("head" in metadata["config"])
        else metadata["config"]["extractor"]
    )
    if rng.random() < 0.25:
        node = metadata["config"]
    key = rng.choice(sorted(node))
    if isinstance(node[key], dict) and node[key]:
        node = node[key]
        key = rng.choice(sorted(node))
    node[key] = _absurd(node[key], rng)
    header["__metadata__"][KEY] = json.dumps(metadata)
    return f"config {key} = {str(node[key])[:40]}"


def _absurd(value: Any, rng: random.Random) -> Any:
    if isinstance(value, list) and value:
        if rng.random() < 0.5:
            return copy.deepcopy(value) * rng.choice((0, 2, 100, 10**5))
        return [_absurd(v, rng) if rng.random() < 0.5 else v for v in value]
    if isinstance(value, bool) or not isinstance(value, int | float | list):
        return rng.choice(ODD)
    if isinstance(value, int):
        return rng.choice((*NUMBERS, -1, -32, 32, 64, 1000, 10**6, 10**9, 10**12, 10**30))
    return rng.choice((-1.0, 0.0, 1e-300, 1e300, float("nan"), float("inf"), 10**400))


def _bomb(rng: random.Random) -> bytes:
    """A header of much JSON, or one that says that it is long."""
    return rng.choice(
        (
            lambda: b"{" * 5000,
            lambda: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
            lambda: b'{"a":[' + b"[]," * 5_000_000 + b"[]]}",
            lambda: b'{"__metadata__":{"wsiseg":"' + b"9" * 8_000_000 + b'"}}',
            lambda: b'{"a":{"dtype":"F32","shape":[' + b"1," * 10**6 + b'1],"data_offsets":[0,4]}}',
            lambda: b"{" + b" " * 17_000_000 + b"}",
            lambda: b'{"a":' + b"9" * 10**5 + b"}",
            lambda: b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,' + b"9" * 4300 + b"]}}",
        )
    )()
