from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from wsiseg.config import apply_overrides, difference, from_mapping, load_yaml, to_mapping
from wsiseg.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = Inner()
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = (0.0, 1.0)
    limit: float | None = None
    many: tuple[Inner, ...] = ()
    names: Mapping[str, float] = field(default_factory=dict)


def test_round_trip() -> None:
    config = Outer(3, Inner(1.0, "b"), (4,), (1.0, 2.0), 5.0, (Inner(),), {"a": 2.0})
    assert from_mapping(Outer, to_mapping(config)) == config


def test_int_becomes_float_and_nothing_else_is_converted() -> None:
    assert from_mapping(Outer, {"steps": 1, "inner": {"rate": 2}}).inner.rate == 2.0
    for text in ("1e-4", "-2.5E+3", "1e30"):  # words to YAML 1.1
        assert from_mapping(Outer, {"steps": 1, "limit": text}).limit == float(text)
    for text in ("1e", "e4", "0x10", "nan", "1_0"):
        with pytest.raises(ConfigError, match="limit: must be float"):
            from_mapping(Outer, {"steps": 1, "limit": text})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "missing key steps"),
        ({"steps": 1, "stps": 2}, "unknown key stps"),
        ({"steps": 1, "inner": {"rat": 2}}, "unknown key inner.rat"),
        ({"steps": 1.5}, "steps: must be int"),
        ({"steps": True}, "steps: must be int"),
        ({"steps": "3"}, "steps: must be int"),
        ({"steps": 1, "inner": {"kind": "c"}}, "inner.kind: 'c' is not one of a, b"),
        ({"steps": 1, "pair": [1.0]}, "pair: must have 2 entries"),
        ({"steps": 1, "sizes": [1, "x"]}, r"sizes\[1\]: must be int"),
        ({"steps": 1, "inner": 3}, "inner: must be a mapping"),
        ({"steps": 1, "names": ["a"]}, "names: must be a mapping"),
        ({"steps": 1, "names": {"a": "x"}}, r"names\.a: must be float"),
        ({"steps": 1, "names": {3: 1.0}}, "names, a key: must be str"),
        ({"steps": 1, "many": [{"rate": "x"}]}, r"many\[0\].rate: must be float"),
    ],
)
def test_mistakes_are_named(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(Outer, data)


def test_overrides() -> None:
    data = {"inner": {"rate": 1.0}, "steps": 1}
    changed = apply_overrides(data, ["inner.rate=2.5", "sizes=[7, 8]", "limit=null"])
    assert changed == {"inner": {"rate": 2.5}, "steps": 1, "sizes": [7, 8], "limit": None}
    assert data["inner"] == {"rate": 1.0}
    for bad in ("steps", "=1", "steps.x=1", "a=[1"):
        with pytest.raises(ConfigError, match="--set"):
            apply_overrides(data, [bad])


def test_the_first_difference_is_named() -> None:
    config = Outer(3, Inner(1.0, "b"), names={"a": 2.0})
    assert difference(config, config) == ""
    assert difference(config, Outer(3, Inner(0.5, "b"))) == "inner.rate was 1.0 and is 0.5"
    assert difference(config, Outer(3, Inner(1.0, "b"))) == "names.a was 2.0 and is None"
    long = Outer(3, Inner(1.0, "b"), sizes=tuple(range(100)))
    assert "..." in difference(config, long)
    assert len(difference(config, long)) < 120


def test_yaml_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_yaml(tmp_path / "none.yaml")
    for text in ("a: [1", "- 1", "!!python/object:os.system {}"):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_yaml(path)
        assert "\n" not in str(caught.value)
