"""`wsiseg models list` and `show`, as text and JSON; import is tested with the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from wsiseg.cli.models import command
from wsiseg.errors import ConfigError, OutputError, UsageError
from wsiseg.models import zoo
from wsiseg.models.card import add_to_card
from wsiseg.models.checkpoint import load_model, save_checkpoint, save_extractor
from wsiseg.models.registry import ModelConfig, build_extractor, build_segmenter
from wsiseg.models.storage import sha256_of
from wsiseg.models.zoo import BUNDLED

COUNTS = {
    "hipt": 21665664,
    "unet": 400920579,
    "first_stage": 55322782,
    "conditioner": 590848,
    "fcn": 17470150,
}


def output(*arguments: str) -> str:
    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code == 0, result.output
    assert result.exception is None
    return result.output


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    entry = zoo.MODELS["stain-threshold"]
    assert entry.config is not None
    config = ModelConfig(
        extractor={"name": "stain"},
        head={"name": "fcn", "widths": [4, 4, 4]},
        classes=entry.config.classes,
        mpp=0.62,
    )
    card = {"data": {"train": "synthetic"}, "metrics": {"accuracy": 0.9}, "limits": ["a", "b"]}
    card["validation"] = {"pixel": {"dice": 0.9}}
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, build_segmenter(config), card=card, licence="CC0-1.0")
    return path


def test_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WSISEG_WEIGHTS", str(tmp_path))
    rows = {r["name"]: r for r in json.loads(output("list", "--json"))}
    assert list(rows) == list(zoo.MODELS)
    assert rows["stain-threshold"]["state"] == "needs no weights"
    assert rows["stain-threshold"]["mpp"] == 0.5
    assert rows["pathsegdiff-brca"]["state"] == "weights not imported"
    monkeypatch.setattr(zoo, "BUNDLED", tmp_path)
    text = output("list")
    assert "glas-small  [not in this installation]" in text
    assert all(name in text for name in zoo.MODELS)


def test_list_with_a_file(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(zoo, "BUNDLED", tmp_path)
    checkpoint.rename(tmp_path / "glas-small.safetensors")
    text = output("list")
    assert "glas-small  [ready]" in text
    assert "0.62 um per pixel" in text
    assert "card" in output("show", "glas-small")


def test_show_full_size_as_json() -> None:
    about = json.loads(output("show", "pathsegdiff-brca", "--json"))
    assert {k: about[k] for k in COUNTS} == COUNTS
    assert about["config"]["extractor"]["timesteps"] == [50]
    assert (about["config"]["mpp"], about["config"]["window_px"]) == (0.5, 768)
    assert len(about["features"]) == 13
    assert about["features"][12] == {
        "tap": 12,
        "block": "decoder 11",
        "timestep": 50,
        "channels": 192,
        "stride": 4,
        "side": 64,
    }
    assert "drive.google.com" in about["sources"]["ldm"]
    assert "vit256_small_dino.pth" in about["sources"]["hipt"]
    two = json.loads(output("show", "pathsegdiff-brca", "--json", "--classes", "2"))
    assert two["fcn"] == COUNTS["fcn"] - 4 * 577


def test_show_full_size_as_text() -> None:
    text = output("show", "pathsegdiff-brca")
    for count in COUNTS.values():
        assert f"{count:,}" in text
    assert "decoder 11" in text
    assert "where the original weights are obtained" in text


def test_show_the_bundled_model_with_its_details_and_a_head_called_as_its_denoiser() -> None:
    about = json.loads(output("show", "glas-small", "--json"))
    assert [row["block"] for row in about["features"]].count("first stage") == 2
    assert about["features"][-1]["stride"] == 4
    parts = [about[part] for part in about["parts"]]
    held = (BUNDLED / "glas-small.safetensors").stat().st_size / 2  # fp16
    assert about["total"] == sum(parts)
    assert 0.95 * held < about["total"] < held
    assert "unet_head" in output("show", "glas-small")


def test_show_a_file(checkpoint: Path) -> None:
    text = output("show", str(checkpoint))
    assert "0.62 um per pixel" in text
    assert "Other tissue  (background)" in text
    assert "accuracy: 0.9" in text
    assert "limits: a, b" in text
    about = json.loads(output("show", str(checkpoint), "--json"))
    assert about["licence"] == "CC0-1.0"
    assert about["trained_head"] is True
    assert about["fcn"] == about["total"]


@pytest.mark.parametrize(
    ("card", "said"),
    [({"pretraining": {"mpp": 1.28}}, "160 px at 1.28 um per pixel"), ({}, "160 px")],
)
def test_show_an_extractor_without_a_head(card: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "extractor.safetensors"
    extractor = build_extractor({"name": "cnn", "channels": [4, 4, 4, 4], "tile_px": 160})
    save_extractor(path, extractor, card=card, licence="CC0-1.0")
    assert f"  window {said}, tile 160 px\n" in output("show", str(path))
    config = json.loads(output("show", str(path), "--json"))["config"]
    assert (config["window_px"], config["mpp"]) == (160, 1.28 if card else None)


def test_show_what_is_not_there(tmp_path: Path) -> None:
    for name, message in (
        ("resnet", "'resnet' is not known; use glas-small"),
        ("glas-smal", "'glas-smal' is not known; did you mean glas-small?"),
        (str(tmp_path / "x.safetensors"), "there is no such file"),
    ):
        result = CliRunner().invoke(command, ["show", name])
        assert isinstance(result.exception, UsageError)
        assert result.exception.exit_code == 2
        assert message in str(result.exception)


def test_a_card_that_could_not_be_read_back_is_not_written(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    for statement in ({"dataset": "GlaS"}, {"training_images": 85}, {"pretraining": {"mpp": "x"}}):
        with pytest.raises(OutputError, match=f"card's {next(iter(statement))}"):
            add_to_card(checkpoint, statement, out=checkpoint)
    assert checkpoint.read_bytes() == before


def test_a_licence_among_the_statements_is_that_of_the_weights(checkpoint: Path) -> None:
    add_to_card(checkpoint, {"licence": "A; B", "use": "lungs"}, out=checkpoint)
    info = load_model(checkpoint).info
    assert info.licence == "A; B"
    assert info.card["use"] == "lungs"
    assert "licence" not in info.card
    add_to_card(checkpoint, {"use": "colon"}, out=checkpoint)
    assert load_model(checkpoint).info.licence == "A; B"
    for wrong in (None, "", ["A", "B"]):
        with pytest.raises(UsageError, match="licence: give the terms"):
            add_to_card(checkpoint, {"licence": wrong}, out=checkpoint)


def test_card_of_no_file_is_a_usage_error(tmp_path: Path) -> None:
    words = ["card", str(tmp_path / "no.safetensors"), "--out", str(tmp_path / "o.safetensors")]
    (tmp_path / "metrics.json").write_text("{}")
    for more in ([], ["--metrics", str(tmp_path / "metrics.json")]):
        error = CliRunner().invoke(command, [*words, *more]).exception
        assert isinstance(error, UsageError)
        assert "there is no such file" in str(error)


def measured(path: Path, **changes: Any) -> dict[str, Any]:
    """What metrics.json says of a checkpoint."""
    return {
        "pixel": {"accuracy": 0.5, "dice": 0.25, "miou": 0.125},
        "object": {"f1": 0.75, "dice": 0.5, "hausdorff": 3.0},
        "calibration": {"ece": 0.01},
        "images": 7,
        "tta": True,
        "seeds": [0],
        "dataset": {"name": "glas"},
        "split": "testA",
        "fold": None,
        "sha256": sha256_of(path),
        **changes,
    }


def test_the_card_says_how_numbers_were_measured(checkpoint: Path, tmp_path: Path) -> None:
    files = []
    for i, how in enumerate(({}, {"raw": True}, {"fill_holes": True, "min_object_um2": 50.0})):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(measured(checkpoint, **how)))
    words = [word for file in files for word in ("--metrics", str(file))]
    out = tmp_path / "new.safetensors"
    output("card", str(checkpoint), *words, "--out", str(out))
    about = json.loads(output("show", str(out), "--json"))
    assert list(about["card"]["metrics"]) == [
        "glas testA, TTA",
        "glas testA, TTA, holes filled, objects from 50 um2",
        "glas testA, TTA, without its post-processing",
    ]
    for wrong, message in (
        ([*words, *words[:2]], "given twice"),
        ([*words, "--set", "temperature=2"], "measured before --set; write that first"),
        ([*words, "--round"], "measured before --round; write that first"),
    ):
        done = CliRunner().invoke(command, ["card", str(checkpoint), *wrong, "--out", str(out)])
        assert isinstance(done.exception, UsageError)
        assert message in str(done.exception)


def test_weights_are_rounded_and_the_card_says_so(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.safetensors"
    output("card", str(checkpoint), "--round", "--set", "temperature=2", "--out", str(out))
    about = json.loads(output("show", str(out), "--json"))["card"]
    assert about["rounded"] == "bfloat16"
    assert not {"metrics", "validation"} & set(about)
    own, rounded = (load_model(path, device="cpu") for path in (checkpoint, out))
    assert rounded.info.temperature == 2
    wanted = own.head.state_dict()["conv.weight"].bfloat16().float()
    torch.testing.assert_close(rounded.head.state_dict()["conv.weight"], wanted)


def test_the_card_of_a_model_with_a_name(tmp_path: Path) -> None:
    out = tmp_path / "new.safetensors"
    output("card", "glas-small", "--set", "temperature=2", "--out", str(out))
    assert load_model(out, device="cpu").info.temperature == 2
    for name, message in (("stain-threshold", "has no weights"), ("glas-smal", "did you mean")):
        done = CliRunner().invoke(command, ["card", name, "--out", str(out)])
        assert isinstance(done.exception, UsageError)
        assert message in str(done.exception)


def test_card_sets_what_no_weight_depends_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        extractor={"name": "cnn", "channels": [4, 4, 4, 4], "tile_px": 32},
        head={"name": "unet", "widths": [4] * 5},
        classes=[
            {"name": "a", "color": [0, 0, 0], "background": True},
            {"name": "b", "color": [9, 9, 9]},
        ],
        window_px=32,
        border=True,
    )
    path, report = tmp_path / "m.safetensors", tmp_path / "metrics.json"
    save_checkpoint(path, build_segmenter(config), card={}, licence="CC0-1.0", dtype="float16")
    chosen = ["--set", "objects.min_area_um2=400", "--set", "temperature=1.5"]
    output("card", str(path), *chosen, "--out", str(path))
    info = load_model(path, device="cpu").info
    assert (info.temperature, info.objects.min_area_um2, info.border) == (1.5, 400.0, True)
    shown = output("show", str(path))
    assert "post-processing: temperature 1.5, min_area_um2 400," in shown
    report.write_text(json.dumps(measured(path)))
    output("card", str(path), "--metrics", str(report), "--out", str(path))
    row = load_model(path, device="cpu").info.card["metrics"]["glas testA, TTA"]
    assert (row["dice"], row["object f1"], row["ece"], row["images"]) == (0.25, 0.75, 0.01, 7)
    for setting, message in (
        ("mpp=1", "only objects and temperature"),
        ("temperature=0", "above 0"),
    ):
        refused = CliRunner().invoke(
            command, ["card", str(path), "--set", setting, "--out", str(path)]
        )
        assert isinstance(refused.exception, UsageError | ConfigError)
        assert message in str(refused.exception)


def test_numbers_belong_to_the_file_that_they_were_measured_with(
    checkpoint: Path, tmp_path: Path
) -> None:
    report = {
        "pixel": {"accuracy": 0.5, "dice": 0.25, "miou": 0.125},
        "images": 7,
        "tta": False,
        "seeds": [0],
        "dataset": {"name": "glas"},
        "split": "train",
        "fold": "1/3",
        "sha256": sha256_of(checkpoint),
    }
    path, out = tmp_path / "metrics.json", tmp_path / "new.safetensors"
    path.write_text(json.dumps(report))
    output("card", str(checkpoint), "--metrics", str(path), "--out", str(out))
    about = json.loads(output("show", str(out), "--json"))
    assert list(about["card"]["metrics"]) == ["glas train, fold 1/3"]
    assert "validation" in about["card"]
    other = CliRunner().invoke(command, ["card", str(out), "--metrics", str(path), "--out", "x"])
    assert isinstance(other.exception, UsageError)
    assert "another file" in str(other.exception)
    changed = ["--set", "objects.min_area_um2=400", "--out", str(out)]
    output("card", str(out), *changed)
    assert (
        not {"metrics", "validation"}
        & json.loads(output("show", str(out), "--json"))["card"].keys()
    )


def test_a_card_is_short_for_people() -> None:
    text = output("show", "glas-small")
    assert len(text.splitlines()) < 90
    assert text.index("  use: ") < text.index("  limits:") < text.index("  commands:")
    assert "extractor: a record of its own" in text


def test_commands_of_a_card_can_be_copied() -> None:
    lines = [line.strip() for line in output("show", "glas-small").splitlines()]
    card = json.loads(output("show", "glas-small", "--json"))["card"]
    assert set(card["commands"] + card["limits"]) <= set(lines)
