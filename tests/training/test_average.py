"""The mean of models: weights, card, and what has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from wsiseg.classes import Classes, TissueClass
from wsiseg.cli.models import command
from wsiseg.errors import UsageError
from wsiseg.models.checkpoint import load_model, read_card, save_checkpoint
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.models.storage import sha256_of
from wsiseg.training.ancestors import chain, kept_of, listed
from wsiseg.training.average import average_models
from wsiseg.training.start import joined

CLASSES = Classes((TissueClass("rest", (0, 0, 200), True), TissueClass("gland", (200, 0, 0))))
CONFIG = ModelConfig(
    extractor={"name": "cnn", "arch": "resnet18", "channels": [4, 4, 4, 4], "tile_px": 32},
    head={"name": "unet", "widths": [4, 4]},
    classes=CLASSES,
    window_px=32,
)
NET = {**CONFIG.extractor, "strides": [2, 4]}


def written(folder: Path, name: str, seed: int, *, config: ModelConfig, **card: Any) -> Path:
    torch.manual_seed(seed)
    model = build_segmenter(config)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.uniform_()  # type: ignore[union-attr, operator]
            norm.num_batches_tracked.fill_(seed)  # type: ignore[union-attr, operator]
    path = folder / f"{name}.safetensors"
    about = {"training_contents": [f"{seed:064x}"], "images": {"training": 1, "validation": 0}}
    save_checkpoint(path, model, card={**about, **card}, licence=f"terms {name}; all")
    return path


@pytest.fixture
def config() -> ModelConfig:
    return replace(CONFIG, extractor=NET, head={"name": "unet", "widths": [4]})


def test_weights_are_the_mean_and_the_card_knows_all(config: ModelConfig, tmp_path: Path) -> None:
    metrics = {"metrics": {"glas testA": {"dice": 0.9}}, "rounded": "bfloat16"}
    files = [written(tmp_path, n, k, config=config, **metrics) for k, n in enumerate("abc")]
    out = tmp_path / "mean.safetensors"
    done = CliRunner().invoke(command, ["average", *map(str, files), "--out", str(out)])
    assert done.exit_code == 0, done.output
    mean = load_model(out, device="cpu").state_dict()
    states = [load_model(f, device="cpu").state_dict() for f in files]
    for name, value in mean.items():
        if value.is_floating_point():
            wanted = torch.stack([s[name] for s in states]).mean(dim=0)
            torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(value, states[-1][name])
    about = read_card(out)
    assert about["licence"] == "terms c; all; terms a; terms b"
    assert [m["name"] for m in about["card"]["averaged"]] == ["a", "b", "c"]
    assert not {"metrics", "rounded"} & set(about["card"])
    known = {c for card in chain(about["card"]) for c in listed(card, "training_contents")}
    assert known == {f"{seed:064x}" for seed in range(3)}


def test_a_start_is_told_once(config: ModelConfig, tmp_path: Path) -> None:
    first = written(tmp_path, "first", 0, config=config)
    start = {"name": "first", "sha256": sha256_of(first), **read_card(first)["card"]}
    second = written(tmp_path, "second", 1, config=config, extractor=start)
    average_models([first, second], tmp_path / "mean.safetensors")
    mean, old = read_card(tmp_path / "mean.safetensors")["card"], sha256_of(first)
    cards = chain(mean)
    assert [c.get("sha256") for c in cards] == [None, old]
    assert [listed(c, "training_contents") for c in cards] == [[f"{k:064x}"] for k in (1, 0)]


def test_images_that_a_start_was_told_without_are_known(
    config: ModelConfig, tmp_path: Path
) -> None:
    first = written(tmp_path, "first", 0, config=config, trainable="none")
    about = {"name": "first", "sha256": sha256_of(first), **read_card(first)["card"]}
    (start,) = kept_of(about, with_head=False)  # only its head has learnt from them
    assert "training_contents" not in start
    second = written(tmp_path, "second", 1, config=config, extractor=start)
    for models in ([first, second], [second, first]):
        average_models(models, tmp_path / "mean.safetensors")
        cards = chain(read_card(tmp_path / "mean.safetensors")["card"])
        known = {c for card in cards for c in listed(card, "training_contents")}
        assert known == {f"{k:064x}" for k in (0, 1)}
        hashes = [c["sha256"] for c in cards if "sha256" in c]
        assert len(hashes) == len(set(hashes))


def test_terms_stand_once_and_unknown_ones_only_alone() -> None:
    assert joined(["A; B", "unknown", "C; B", ""]) == "A; B; C"
    assert joined(["", "unknown"]) == "unknown"


def test_what_has_no_mean_is_refused(config: ModelConfig, tmp_path: Path) -> None:
    first = written(tmp_path, "first", 0, config=config)
    with pytest.raises(UsageError, match="give two or more"):
        average_models([first], tmp_path / "out.safetensors")
    other = written(tmp_path, "other", 1, config=replace(config, mpp=2.0))
    with pytest.raises(UsageError, match="first and other differ in mpp"):
        average_models([first, other], tmp_path / "out.safetensors")
    with pytest.raises(UsageError, match="stain-threshold has no weights"):
        average_models(["stain-threshold"] * 2, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
