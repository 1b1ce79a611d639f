"""One safetensors file with JSON metadata under one key: written whole or not at all, never pickle.

Knows no networks. The header is read and checked before any tensor is: what the file is, whether
it is complete, which format version it has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from wsiseg.atomic import staged
from wsiseg.errors import CheckpointError, MissingCheckpointError, OutputError

FORMAT = 1
"""Version of the metadata; a file with a higher one is refused."""
KEY = "wsiseg"
"""The key of the safetensors metadata that holds the JSON."""
PART = "wsiseg.part"
"""In the metadata of a file that a stage of the pretraining hands to the next."""
KINDS = ("segmenter", "extractor")
"""What a file can hold: extractor and head, or an extractor alone."""
Precision = Literal["float32", "float16"]
"""How floating tensors are stored; they are float32 again when read."""
MAX_HEADER = 16_000_000
"""Bytes of a header; the metadata and ten thousand tensors take half of it. As JSON it can take
thirty times as much memory."""
MAX_METADATA = 4_000_000
"""Characters of the metadata."""
MAX_DEPTH = 20
"""Levels of nesting in the metadata; configurations have four, cards a few more."""

_FOREIGN = (
    # (first bytes, what such a file is)
    (b"PK\x03\x04", "a zip archive, as torch.save writes"),
    (b"\x80\x02", "a pickle file"),
    (b"\x80\x03", "a pickle file"),
    (b"\x80\x04", "a pickle file"),
    (b"\x80\x05", "a pickle file"),
    (b"\x89HDF", "an HDF5 file"),
)


def pack(state: Mapping[str, Tensor], prefix: str, dtype: Precision) -> dict[str, Tensor]:
    """The tensors to store under prefixed names.

    Args:
        state: a state dict.
        prefix: put before each name.
        dtype: float16 rounds tensors of two and more dimensions; vectors stay float32.

    Raises:
        CheckpointError: values that are not finite, or not in the range of float16.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            half = dtype == "float16" and tensor.dim() > 1
            tensor = tensor.detach().to(torch.float16 if half else torch.float32)
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{prefix}{name}: values are not finite as {tensor.dtype}; not written"
                )
        packed[prefix + name] = tensor
    return packed


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata under a temporary name in the same folder, then rename.

    Args:
        path: the file; replaced if it exists.
        tensors: by name; each is stored by itself, tensors that share memory included.
        metadata: plain data; `format` is added.

    Raises:
        OutputError: a card that could not be read back; the folder cannot be written or the disk
            is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    text = as_text(path, metadata)
    with staged(path, also=(SafetensorError,)) as (part,):
        save_file(_unshared(tensors), part, metadata={KEY: text})
        part.chmod(0o644)  # safetensors makes files that only their owner can read


def as_text(path: Path, metadata: Mapping[str, Any]) -> str:
    """The metadata as they are written into a file.

    Raises:
        OutputError: they could not be read back.
    """
    try:
        text = json.dumps({"format": FORMAT, **metadata}, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as e:
        raise OutputError(f"{path}: the card holds what JSON cannot ({e}); write it as text") from e
    if len(text.encode()) > MAX_METADATA:
        raise OutputError(f"{path}: the card is over {MAX_METADATA} bytes; shorten it")
    if odd := _odd_in_card(metadata):
        raise OutputError(f"{path}: not written: the card's {odd}")
    if _too_deep(metadata):
        raise OutputError(f"{path}: the card is nested deeper than {MAX_DEPTH} levels; flatten it")
    return text


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().to("cpu").contiguous()
        pointer = kept.untyped_storage().data_ptr()
        if pointer in seen:
            kept = kept.clone()
        seen.add(kept.untyped_storage().data_ptr())
        result[name] = kept
    return result


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Metadata and tensor shapes of a checkpoint, without reading the tensors.

    Returns:
        (metadata, shapes by tensor name).

    Raises:
        CheckpointError: the file is missing, empty, truncated, of another kind, without wsiseg's
            metadata or of a newer format.
    """
    header = _json_header(path)
    meta = header.pop("__metadata__", None)
    text = meta.get(KEY) if isinstance(meta, dict) else None
    if isinstance(meta, dict) and PART in meta:
        raise CheckpointError(
            f"{path}: one stage's part of a pretraining; the last stage writes "
            "extractor.safetensors beside it"
        )
    if not isinstance(text, str):
        raise CheckpointError(
            f"{path}: a safetensors file, but not one of wsiseg; bring the authors' weights in "
            "with 'wsiseg models import'"
        )
    metadata = _parse_metadata(path, text)
    try:
        shapes = {name: tuple(int(n) for n in t["shape"]) for name, t in header.items()}
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise CheckpointError(f"{path}: damaged header; fetch the file again") from e
    return metadata, shapes


def _json_header(path: Path) -> dict[str, Any]:
    """The safetensors header, after checking that the file is one and complete."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(min(length, MAX_HEADER))
            if not text.startswith(b"{"):  # a length can begin like another kind of file
                _refuse_foreign(path, start, size)
            if len(start) < 8 or length > MAX_HEADER:
                raise CheckpointError(f"{path}: not a safetensors file; give a wsiseg checkpoint")
    except FileNotFoundError as e:
        raise MissingCheckpointError(f"{path}: there is no such file") from e
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror or e})") from e
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: not a safetensors file; give a wsiseg checkpoint")
    if len(text) < length:
        raise CheckpointError(f"{path}: truncated inside its header; fetch the file again")
    try:
        header: dict[str, Any] = json.loads(text)
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
        if not (isinstance(expected, int) and 0 < expected < 2**63):
            raise ValueError("sizes that cannot be")
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError) as e:
        raise CheckpointError(f"{path}: damaged header; fetch the file again") from e
    if size != expected:
        raise CheckpointError(
            f"{path}: {size} bytes where its header says {expected}; fetch the file again"
        )
    return header


def _refuse_foreign(path: Path, start: bytes, size: int) -> None:
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    for magic, what in _FOREIGN:
        if start.startswith(magic):
            raise CheckpointError(
                f"{path}: {what}, which can run code when opened; bring the authors' weights in "
                "with 'wsiseg models import'"
            )


def _parse_metadata(path: Path, text: str) -> dict[str, Any]:
    if len(text) > MAX_METADATA:
        raise CheckpointError(f"{path}: {len(text)} characters of metadata, which cannot be")
    try:
        metadata: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: damaged metadata; fetch the file again") from e
    if _too_deep(metadata):
        raise CheckpointError(f"{path}: metadata nested deeper than {MAX_DEPTH} levels")
    version = metadata.get("format") if isinstance(metadata, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path}: metadata without a format version; fetch the file again")
    if version > FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {version}, this wsiseg reads up to {FORMAT}; update wsiseg"
        )
    if metadata.get("kind") not in KINDS:
        raise CheckpointError(
            f"{path}: holds {metadata.get('kind')!r}, not one of {', '.join(KINDS)}"
        )
    _check_card(path, metadata)
    return metadata


def _too_deep(metadata: Any) -> bool:
    level: list[Any] = [metadata] if isinstance(metadata, dict) else []
    for _ in range(MAX_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for values in inner for v in values if isinstance(v, dict | list | tuple)]
    return bool(level)


def _check_card(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse a card whose parts that are read are not as written; the rest is for people."""
    if _odd_in_card(metadata):
        raise CheckpointError(f"{path}: a card that wsiseg did not write; fetch the file again")


def _odd_in_card(metadata: Mapping[str, Any]) -> str:
    """What is wrong with a part of the card that is read; empty if nothing is."""
    card = metadata.get("card")
    if not isinstance(card, dict):
        return ""  # checked with the configuration
    for name in ("pretraining", "dataset"):
        if not isinstance(card.get(name, {}), dict):
            return f"{name} must be a mapping"
    lists = ("training_images", "training_groups", "training_contents")
    for name in (*lists, "validation_groups", "background_contents"):
        found = card.get(name, [])
        if not isinstance(found, list) or not all(isinstance(v, str) for v in found):
            return f"{name} must be a list of names"
    mpp = card.get("pretraining", {}).get("mpp")
    return "" if mpp is None or isinstance(mpp, int | float) else "pretraining.mpp must be a number"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file on the CPU, floating ones as float32.

    Raises:
        CheckpointError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor: Tensor = file.get_tensor(name)
                kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
                tensors[name] = tensor.to(kind, copy=True)  # own memory: the file may be replaced
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{path}: cannot be read ({e}); fetch the file again") from e
    return tensors


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as e:
        raise MissingCheckpointError(f"{path}: there is no such file") from e
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror or e})") from e


def fingerprint(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 of a configuration and of tensors' names, shapes and float32 values."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu")
        tensor = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        digest.update(f"\0{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
