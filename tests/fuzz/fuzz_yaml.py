"""Hostile YAML: tags, aliases that repeat without end, deep nesting, numbers that cannot be."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_bytes import damage
from fuzz_case import OUT, Case, command

from wsiseg.config import apply_overrides, from_mapping, load_yaml, to_mapping
from wsiseg.datasets.table import dataset_mapping
from wsiseg.models.registry import EXTRACTORS, resolve
from wsiseg.training.pretrain_config import pretrain_config
from wsiseg.training.train_config import TrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VALUES = (
    *("!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!!int x"),
    *("!!python/object/new:pathlib.Path [pwned]", "!!timestamp x", "!!bool x", "!!float x"),
    *("2001-99-99", "2001-01-01", "!!binary x", "!!set {a, b}", "!!omap [a: 1]", "!!null x"),
    *("1" * 5000, "0x" + "f" * 5000, "1" + ":59" * 2000, "-1", "0", "1e999", ".inf", ".nan"),
    *("1e-400", "99999999999999999999", "0b" + "1" * 20000, "&a [*a]", "{a: &a {b: *a}}"),
    *("[" * 400 + "]" * 400, "{a: " * 90 + "1" + "}" * 90, '"\\u001b[2J"', '"a\\nb"', "''"),
    *("../../../etc/passwd", "/etc/passwd", "'..'", "'**/**/*'", '"\\0"', "[1, 2", "? [a]\n: 1"),
    *("[" + "1, " * 20_000 + "1]", "x" * 100_000, "null", "~", "yes", "[]", "{}", "*missing"),
)
KINDS = ("train", "pretrain", "datasets")


class Maker:
    """Makes configurations from those that are shipped."""

    def __init__(self, seeds: Path) -> None:
        found = {k: sorted((CONFIGS / k).rglob("*.yaml")) for k in KINDS}
        self.texts = [(k, p.read_text()) for k in KINDS for p in found[k]]

    def make(self, rng: random.Random, folder: Path) -> Case:
        """A YAML file and what reads it."""
        kind, text = rng.choice(self.texts)
        roll = rng.random()
        path = folder / "config.yaml"
        if roll < 0.2:
            path.write_bytes(damage(text.encode(), rng))
            what = "damaged bytes"
        elif roll < 0.35:
            path.write_text(_laughs(rng))
            what = "aliases"
        else:
            text, what = _with_value(text, rng)
            path.write_text(text)
        if rng.random() < 0.05:
            return Case(f"train, {what}", lambda: _train(path, folder))
        if rng.random() < 0.15:
            setting = f"{rng.choice(('loop.steps', 'extractor.taps', 'a.b.c', 'mpp', 'seed'))}="
            setting += rng.choice(VALUES)
            return Case(f"--set {setting[:60]}", lambda: _override(kind, setting))
        return Case(f"{kind}: {what}", lambda: READERS[kind](path))


def _with_value(text: str, rng: random.Random) -> tuple[str, str]:
    """The text with one or two of its values replaced."""
    lines = text.splitlines()
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        places = [i for i, line in enumerate(lines) if ":" in line and not line.startswith("#")]
        place, value = rng.choice(places), rng.choice(VALUES)
        key = lines[place].partition(":")[0]
        lines[place] = f"{key}: {value}"
        done.append(f"{key.strip()}: {value[:40]}")
    return "\n".join(lines), "; ".join(done)


def _laughs(rng: random.Random) -> str:
    """Lists, or merged mappings, each of which holds the one before many times."""
    count, depth = rng.choice((2, 9, 50)), rng.choice((5, 9, 30, 49, 60))
    if rng.random() < 0.5:
        rows = ["a0: &a0 [x, x]"]
        rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * count)}]" for i in range(1, depth)]
    else:
        rows = ["a0: &a0 {x: 1}"]
        for i in range(1, depth):
            rows.append(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * count)}]\n  k{i}: 1")
    return "\n".join([*rows, f"extractor: *a{depth - 1}", f"head: *a{depth - 1}"])


def _read_train(path: Path) -> None:
    config = from_mapping(TrainConfig, load_yaml(path))
    to_mapping(config)
    if isinstance(config.extractor, dict) and "name" in config.extractor:
        resolve(config.extractor, EXTRACTORS, "extractor")


def _read_pretrain(path: Path) -> None:
    to_mapping(pretrain_config(load_yaml(path)))


def _read_dataset(path: Path) -> None:
    dataset_mapping(path)


READERS: dict[str, Callable[[Path], None]] = {
    "train": _read_train,
    "pretrain": _read_pretrain,
    "datasets": _read_dataset,
}


def _override(kind: str, setting: str) -> None:
    data: dict[str, Any] = {"loop": {"steps": 5}, "extractor": {"name": "hipt"}}
    changed = apply_overrides(data, [setting])
    if kind == "train":
        to_mapping(from_mapping(TrainConfig, changed))


def _train(path: Path, folder: Path) -> None:
    """The command, on a data set that is not there: it must not get as far as writing."""
    options = ("--dataset", path, "--data", folder / "none", "--out", folder / OUT)
    command("train", *options, "--config", path)
