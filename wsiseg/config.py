"""YAML or JSON mappings to typed configurations (frozen dataclasses), strictly. Knows no torch.

A configuration class is a dataclass whose fields are bool, int, float, str, tuples of those,
other such dataclasses, `X | None` or `Literal[...]`. Unknown keys, missing required keys and
values of the wrong type are errors that name the key; nothing is converted silently except
int to float, and 1e-4 without a point, which YAML reads as a word.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from wsiseg.errors import ConfigError

T = TypeVar("T")
_SCIENTIFIC = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


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
        ConfigError: the file is missing, not YAML or not a mapping.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{path}: cannot read the configuration ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8; save it as UTF-8 text") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(e).split())})") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    return data


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
        raise ConfigError(f"{where or cls.__name__}: must be a mapping, not {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    unknown = [k for k in data if k not in fields]
    if unknown:
        raise ConfigError(
            f"unknown key {prefix}{unknown[0]}; known here: {', '.join(sorted(fields))}"
        )
    values = {k: _convert(hints[k], v, f"{prefix}{k}") for k, v in data.items()}
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise ConfigError(f"missing key {prefix}{name}")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        return _convert(rest[0], value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where}: must be a list, not {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            kinds = [args[0]] * len(value)
        elif len(args) == len(value):
            kinds = list(args)
        else:
            raise ConfigError(f"{where}: must have {len(args)} entries, not {len(value)}")
        pairs = zip(kinds, value, strict=True)
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(pairs))
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
    raise ConfigError(f"{where}: must be {kind.__name__}, not {value!r}")


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
            node[last] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise ConfigError(f"--set {text}: the value is not YAML") from e
    return result


def _copy(data: Any) -> Any:
    return {k: _copy(v) for k, v in data.items()} if isinstance(data, Mapping) else data
