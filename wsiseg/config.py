"""YAML or JSON mappings to typed configurations (frozen dataclasses), strictly. Knows no torch.

A configuration class is a dataclass whose fields are bool, int, float, str, tuples of those,
other such dataclasses, `X | None` or `Literal[...]`. Unknown keys, missing required keys and
values of the wrong type are errors that name the key; nothing is converted silently except
int to float, and 1e-4 without a point, which YAML reads as a word.
"""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from wsiseg.errors import ConfigError

T = TypeVar("T")
_SHORT = 40
"""Characters of a value in a message."""
_SCIENTIFIC = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
_MAX_BYTES = 1 << 20
"""Of a YAML file. The largest real ones, lists of some thousand image names, have 200 kB."""
_MAX_VALUES = 100_000
"""Values in a YAML file, each as often as aliases repeat it: a few lines can stand for billions."""
_MAX_DEPTH = 50
"""Levels of nesting in a YAML file; real ones have six."""
_MAX_INT = 2**63 - 1
"""Largest whole number; larger ones fit no array and cannot be computed with as float."""
_DAMAGE = (  # what PyYAML's constructors raise for a tag on something else, such as !!int word
    yaml.YAMLError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


def find_config(name: str | Path, kind: str) -> Path:
    """The YAML file of a configuration: a path, or the name of one that comes with wsiseg.

    Args:
        name: a file, or what `wsiseg` ships as `configs/<kind>/<name>.yaml`, such as
            bcss/pathsegdiff.
        kind: train, pretrain or datasets.

    Raises:
        ConfigError: neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    here = Path(__file__).resolve().parent
    root = next((r for r in (here / "configs", here.parent / "configs") if r.is_dir()), here)
    known = sorted(
        str(p.relative_to(root / kind).with_suffix("")) for p in (root / kind).rglob("*.yaml")
    )
    if str(name) in known:
        return (root / kind / str(name)).with_suffix(".yaml")
    raise ConfigError(f"{name}: no such file, nor one of the shipped ones: {', '.join(known)}")


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, too large, not YAML or not a mapping.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"{path}: cannot read the configuration ({e.strerror})") from e
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{path}: over {_MAX_BYTES >> 20} MiB, too large for a configuration")
    try:
        data = _parse(text.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8; save it as UTF-8 text") from e
    except _DAMAGE as e:
        raise ConfigError(f"{path}: not YAML ({_reason(e)})") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    return data


def _parse(text: str) -> Any:
    """The data in a YAML text; plain data only, no tags of Python.

    Raises:
        Exception: one of _DAMAGE, also where the text stands for too much.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_extent(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_extent(root: yaml.Node) -> None:
    """Refuse a document whose aliases repeat, or whose nesting holds, more than anyone writes."""
    count, waiting = 0, [(root, 1)]
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if count > _MAX_VALUES or depth > _MAX_DEPTH:
            raise ValueError(
                f"over {_MAX_VALUES} values or {_MAX_DEPTH} levels of nesting, aliases counted"
            )
        if isinstance(node, yaml.SequenceNode):
            waiting.extend((n, depth + 1) for n in node.value)
        elif isinstance(node, yaml.MappingNode):
            waiting.extend((n, depth + 1) for pair in node.value for n in pair)


def _reason(error: Exception) -> str:
    """What is wrong, in one line."""
    if isinstance(error, RecursionError):
        return "too deeply nested"
    return " ".join(str(error).split())[:300]


def _shown(value: Any) -> str:
    """A value for a message: of large ones the beginning."""
    if isinstance(value, int) and abs(value) > _MAX_INT:
        return "a number beyond 2^63"
    try:
        return reprlib.repr(value)
    except ValueError:  # a huge number inside
        return f"a {type(value).__name__}"


def from_mapping(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """A configuration of class `cls` from plain data.

    Args:
        cls: a dataclass.
        data: mapping, as from YAML or JSON.
        where: dotted path of `data`, for messages.

    Raises:
        ConfigError: unknown or missing keys, values of the wrong type or out of range.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or cls.__name__}: must be a mapping, not {_shown(data)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    unknown = [k for k in data if k not in fields]
    if unknown:
        raise ConfigError(
            f"unknown key {prefix}{_key(unknown[0])}; known here: {', '.join(sorted(fields))}"
        )
    values = {k: _convert(hints[k], v, f"{prefix}{k}") for k, v in data.items()}
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise ConfigError(f"missing key {prefix}{name}")
    return cls(**values)


def _key(key: Any) -> str:
    return key[:80] if isinstance(key, str) else _shown(key)


def _convert(kind: Any, value: Any, where: str) -> Any:
    if isinstance(value, int) and abs(value) > _MAX_INT:
        raise ConfigError(f"{where}: {_shown(value)} is too large")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {value} is no number to compute with")
    origin, args = get_origin(kind), get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        return _convert(rest[0], value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {_shown(value)} is not one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where}: must be a list, not {_shown(value)}")
        if len(args) == 2 and args[1] is Ellipsis:
            kinds = [args[0]] * len(value)
        elif len(args) == len(value):
            kinds = list(args)
        else:
            raise ConfigError(f"{where}: must have {len(args)} entries, not {len(value)}")
        pairs = zip(kinds, value, strict=True)
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(pairs))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: must be a mapping, not {_shown(value)}")
        return {
            _convert(args[0], k, f"{where}, a key"): _convert(args[1], v, f"{where}.{_key(k)}")
            for k, v in value.items()
        }
    if dataclasses.is_dataclass(kind):
        if isinstance(kind, type) and isinstance(value, kind):
            return value
        return from_mapping(typing.cast(type[Any], kind), value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str) and _SCIENTIFIC.fullmatch(value):
        return float(value)  # 1e-4, which YAML 1.1 reads as a word
    if kind is Any or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    raise ConfigError(f"{where}: must be {kind.__name__}, not {_shown(value)}")


def to_mapping(config: Any) -> Any:
    """The configuration as plain data that YAML and JSON can hold; reverse of `from_mapping`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = [f for f in dataclasses.fields(config) if f.init]
        return {f.name: to_mapping(getattr(config, f.name)) for f in fields}
    if isinstance(config, tuple | list):
        return [to_mapping(v) for v in config]
    if isinstance(config, Mapping):
        return {k: to_mapping(v) for k, v in config.items()}
    return config


def difference(held: Any, wanted: Any) -> str:
    """Where two configurations differ first, and how, in words; empty if nowhere."""
    return _difference(to_mapping(held), to_mapping(wanted), "")


def _difference(held: Any, wanted: Any, where: str) -> str:
    if isinstance(held, Mapping) and isinstance(wanted, Mapping):
        keys = dict.fromkeys([*held, *wanted])
        found = (_difference(held.get(k), wanted.get(k), f"{where}.{k}") for k in keys)
        return next((text for text in found if text), "")
    if held == wanted:
        return ""
    texts = (t if len(t) <= _SHORT else f"{t[: _SHORT - 3]}..." for t in map(str, (held, wanted)))
    return f"{where.removeprefix('.')} was {' and is '.join(texts)}"


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with `a.b=value` settings applied; values are read as YAML.

    Raises:
        ConfigError: a setting without '=' or through something that is not a mapping.
    """
    result: dict[str, Any] = _copy(data)
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set {text}: write it as key.subkey=value")
        node: Any = result
        *parents, last = key.split(".")
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {text}: {part} is not a group of keys")
        try:
            node[last] = _parse(value)
        except _DAMAGE as e:
            raise ConfigError(f"--set {text}: the value is not YAML ({_reason(e)})") from e
    return result


def _copy(data: Any) -> Any:
    return {k: _copy(v) for k, v in data.items()} if isinstance(data, Mapping) else data
