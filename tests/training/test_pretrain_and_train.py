"""The whole road from unlabelled tissue to a measured checkpoint, at toy size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from wsiseg.cli import cli
from wsiseg.config import from_mapping
from wsiseg.datasets.glas import GlaS
from wsiseg.errors import CheckpointError, ConfigError, DatasetError, UsageError
from wsiseg.models.checkpoint import load_extractor, load_model, read_card
from wsiseg.training.evaluate import evaluate
from wsiseg.training.inputs import choose_inputs
from wsiseg.training.pretrain import PretrainConfig, pretrain
from wsiseg.training.sliding import predict_image
from wsiseg.training.train import TrainConfig, train, training_patches

EXTRACTOR = {
    "encoder": {"dim": 16, "depth": 1, "heads": 2, "patch_px": 16, "position_px": 64},
    "first_stage": {
        "kind": "kl",
        "channels": [8, 8, 8],
        "layers": 1,
        "latent_channels": 2,
        "groups": 4,
    },
    "unet": {"channels": [8, 8, 16, 16], "layers": 2, "context_dim": 16, "groups": 4},
    "region_dim": 0,
    "tile_px": 64,
}
LOOP = {"batch_size": 4, "warmup_steps": 1, "log_every": 2, "save_every": 2}


def pretrain_config(steps: int = 4, **changes: Any) -> PretrainConfig:
    loop = {**LOOP, "steps": steps}
    dino = {"global_px": 32, "local_px": 16, "local_count": 2, "prototypes": 16}
    data = {
        "extractor": EXTRACTOR,
        "mpp": 1.0,
        "sources": [{"path": "train_*.png", "exclude": "*_anno.png", "mpp": 0.62005}],
        "encoder": {"crop_px": 64, "dino": dino, "loop": loop},
        "autoencoder": {"crop_px": 32, "loop": loop},
        "ldm": {"crop_px": 64, "loop": loop},
        **changes,
    }
    return from_mapping(PretrainConfig, data)


@pytest.fixture(scope="module")
def glands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images in GlaS' layout: purple discs on pink."""
    folder = tmp_path_factory.mktemp("glas")
    rng = np.random.default_rng(0)
    for i in range(1, 7):
        image = Image.new("RGB", (240, 160), (230, 170, 200))
        labels = Image.new("L", (240, 160))
        for k in range(4):
            x, y, r = rng.integers(30, 210), rng.integers(30, 130), rng.integers(15, 30)
            ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), (110, 60, 150))
            ImageDraw.Draw(labels).ellipse((x - r, y - r, x + r, y + r), k + 1)
        noisy = np.asarray(image) + rng.normal(0, 6, (160, 240, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"train_{i}.png")
        labels.save(folder / f"train_{i}_anno.png")
    rows = "".join(f"train_{i},{i},benign,healthy\n" for i in range(1, 7))
    (folder / "Grade.csv").write_text("name, patient ID,grade (GlaS),x\n" + rows)
    return folder


@pytest.fixture(scope="module")
def pretrained(glands: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained")
    for stage in ("encoder", "autoencoder", "ldm"):
        pretrain(stage, pretrain_config(), data=glands, out=out)  # type: ignore[arg-type]
    return out


def test_stages_write_what_the_next_one_needs(pretrained: Path) -> None:
    extractor = load_extractor(pretrained / "extractor.safetensors", device="cpu")
    assert len(extractor.specs) == 13
    metrics = json.loads((pretrained / "ldm" / "metrics.json").read_text())
    assert {"conditioned", "null", "shuffled", "held_out_images", "t500"} <= set(metrics)
    assert len((pretrained / "encoder" / "log.csv").read_text().splitlines()) == 3
    card = read_card(pretrained / "extractor.safetensors")["card"]
    assert card["pretraining"]["mpp"] == 1.0


def test_latents_of_the_extractor_are_standardised(pretrained: Path) -> None:
    card = read_card(pretrained / "extractor.safetensors")
    first_stage = card["config"]["extractor"]["first_stage"]
    assert first_stage["scale"] != 1.0


@pytest.mark.parametrize("stage", ["encoder", "autoencoder"])
def test_a_resumed_run_is_the_uninterrupted_run(stage: Any, glands: Path, tmp_path: Path) -> None:
    whole = pretrain(stage, pretrain_config(4), data=glands, out=tmp_path / "whole")
    half = tmp_path / "half"
    # A run of 4 steps that stops after 2: the state of step 2 is what a kill would leave.
    config = pretrain_config(4)
    stop_after(2, stage, config, glands, half)
    resumed = pretrain(stage, config, data=glands, out=half, resume=True)
    first, second = load_file(whole), load_file(resumed)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_resumed_denoiser_is_the_uninterrupted_one(
    pretrained: Path, glands: Path, tmp_path: Path
) -> None:
    for part in ("encoder", "autoencoder"):
        shutil.copy(pretrained / f"{part}.safetensors", tmp_path)
    stop_after(2, "ldm", pretrain_config(), glands, tmp_path)
    resumed = pretrain("ldm", pretrain_config(), data=glands, out=tmp_path, resume=True)
    first, second = load_file(pretrained / "extractor.safetensors"), load_file(resumed)
    assert all(torch.equal(first[k], second[k]) for k in first)
    report = Path("ldm", "metrics.json")  # of the same held-out batch
    assert (pretrained / report).read_text() == (tmp_path / report).read_text()


def stop_after(step: int, stage: Any, config: PretrainConfig, data: Path, out: Path) -> None:
    import wsiseg.training.loop as loop

    save = loop._save

    def stop(path: Path, task: Any, optimiser: Any, done: int, seconds: float) -> None:
        save(path, task, optimiser, done, seconds)
        if done == step:
            raise KeyboardInterrupt

    loop._save = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            pretrain(stage, config, data=data, out=out)
    finally:
        loop._save = save


def test_runs_are_not_mixed(pretrained: Path, glands: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a run already"):
        pretrain("encoder", pretrain_config(), data=glands, out=pretrained)
    with pytest.raises(UsageError, match="another configuration"):
        pretrain("encoder", pretrain_config(6), data=glands, out=pretrained, resume=True)
    with pytest.raises(CheckpointError, match="run the stage encoder first"):
        pretrain("ldm", pretrain_config(), data=glands, out=tmp_path)
    with pytest.raises(DatasetError, match="no such images"):
        pretrain("encoder", pretrain_config(), data=tmp_path, out=tmp_path / "x")
    # What failed before it began is no run: the same folder is free for another.
    assert pretrain("encoder", pretrain_config(1), data=glands, out=tmp_path / "x").exists()


def train_config(**changes: Any) -> TrainConfig:
    data = {
        "head": {"name": "fcn", "widths": [16, 8, 8]},
        "mpp": 1.0,
        "window_px": 192,
        "patch_tiles": [1, 2],
        "validation_share": 0.3,
        "validate_every": 20,
        "loss": {"cross_entropy": 1.0, "dice": 1.0},
        "augment": {"scale": [1.0, 1.0], "stain_gain": 0.0, "stain_shift": 0.0},
        "loop": {**LOOP, "steps": 60, "learning_rate": 0.01, "save_every": 30},
        "licence": "test",
        **changes,
    }
    return from_mapping(TrainConfig, data)


@pytest.fixture(scope="module")
def trained(glands: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    extractor = load_extractor(pretrained / "extractor.safetensors", device="cpu")
    return train(train_config(), GlaS(glands, "train"), extractor, out=out)


def test_training_learns_what_is_there_to_learn(glands: Path, trained: Path) -> None:
    result = evaluate(load_model(trained, device="cpu"), GlaS(glands, "train"))
    assert result.pixel["dice"] > 0.7  # all of one class: 0.45
    assert set(result.per_image) == {f"train_{i}" for i in range(1, 7)}


def test_the_checkpoint_says_where_it_comes_from(trained: Path) -> None:
    segmenter = load_model(trained, device="cpu")
    assert segmenter.info.classes.names == ("Other tissue", "Gland")
    assert (segmenter.info.mpp, segmenter.info.window_px) == (1.0, 192)
    assert segmenter.info.licence == "test"
    card = segmenter.info.card
    assert card["images"] == {"training": 4, "validation": 2}
    assert 0 < card["validation"]["pixel"]["dice"] <= 1


def test_training_resumes_exactly(glands: Path, pretrained: Path, tmp_path: Path) -> None:
    data = GlaS(glands, "train")
    path = pretrained / "extractor.safetensors"
    config = train_config(loop={**LOOP, "steps": 6, "save_every": 3}, validate_every=3)
    whole = train(config, data, load_extractor(path, device="cpu"), out=tmp_path / "a")

    import wsiseg.training.loop as loop

    save = loop._save

    def stop(path: Path, task: Any, optimiser: Any, done: int, seconds: float) -> None:
        save(path, task, optimiser, done, seconds)
        raise KeyboardInterrupt

    loop._save = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config, data, load_extractor(path, device="cpu"), out=tmp_path / "b")
    finally:
        loop._save = save
    half = train(config, data, load_extractor(path, device="cpu"), out=tmp_path / "b", resume=True)
    first, second = load_file(whole), load_file(half)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_batches_depend_on_their_number_alone(glands: Path) -> None:
    data, config = GlaS(glands, "train"), train_config()
    batches = training_patches(config, choose_inputs(config, data), tile_px=64)
    from_zero, later = batches.batches(4), batches.batches(4, start=3)
    for _ in range(3):
        next(from_zero)
    for first, second in zip(next(from_zero), next(later), strict=True):
        assert np.array_equal(first, second)


def test_predictions_come_at_the_image_size_for_any_size(trained: Path) -> None:
    segmenter = load_model(trained, device="cpu")
    for shape in ((1, 1), (64, 64), (65, 63), (130, 201)):
        image = np.full((*shape, 3), 200, np.uint8)
        for tta in (False, True):
            p = predict_image(segmenter, image, ratio=0.62005, tta=tta).probabilities
            assert p.shape == (2, *shape)
            assert np.allclose(p.sum(0), 1, atol=1e-5)


def test_averaged_views_are_turned_back() -> None:
    """A model without noise and context: every view must give what the plain image gives."""
    segmenter = load_model("stain-threshold", device="cpu")
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 255, (6, 8, 3), dtype=np.uint8)
    image = coarse.repeat(32, axis=0).repeat(32, axis=1)  # in one tile, not square
    plain = predict_image(segmenter, image, ratio=1.0).probabilities
    averaged = predict_image(segmenter, image, ratio=1.0, tta=True).probabilities
    inner = np.s_[:, 8:-8, 8:-8]
    assert np.abs(plain[inner] - averaged[inner]).max() < 1e-4
    assert plain[inner].std() > 0.1


def test_predictions_lie_on_the_image() -> None:
    """Scaling there and back moves nothing: the centre of a square stays where it is."""
    segmenter = load_model("stain-threshold", device="cpu")
    image = np.full((210, 330, 3), 240, np.uint8)
    image[60:121, 200:281] = (70, 40, 130)
    for ratio in (0.5, 0.62005, 1.3):
        dark = predict_image(segmenter, image, ratio=ratio).probabilities[1] > 0.5
        y, x = (float(v.mean()) for v in np.nonzero(dark))
        assert abs(y - 90) < 0.75, (ratio, y)
        assert abs(x - 240) < 0.75, (ratio, x)


def test_training_that_cannot_be(glands: Path, pretrained: Path, tmp_path: Path) -> None:
    data = GlaS(glands, "train")
    path = pretrained / "extractor.safetensors"
    network = load_extractor(path, device="cpu")
    data.groups = ("patient 1",) * len(data)
    with pytest.raises(DatasetError, match="all 6 images are of one group"):
        train(train_config(), data, network, out=tmp_path / "a")
    stain = load_extractor("stain-threshold", device="cpu")
    threshold = train_config(head={"name": "threshold"}, window_px=768, patch_tiles=[1, 1])
    with pytest.raises(UsageError, match="head threshold: has no weights to train"):
        train(threshold, GlaS(glands, "train"), stain, out=tmp_path / "b")
    for changes in ({"validation_share": 1.0}, {"validate_every": -1}, {"patch_tiles": [0, 1]}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            train_config(**changes)


def test_a_run_goes_on_with_its_own_extractor_only(
    glands: Path, pretrained: Path, tmp_path: Path
) -> None:
    data, path = GlaS(glands, "train"), pretrained / "extractor.safetensors"
    config = train_config(loop={**LOOP, "steps": 2}, validate_every=2)
    train(config, data, load_extractor(path, device="cpu"), out=tmp_path)
    other = load_extractor(path, device="cpu")
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(UsageError, match="another extractor, other images or labels"):
        train(config, data, other, out=tmp_path, resume=True)
    rows = (tmp_path / "validation.csv").read_text()
    train(config, data, load_extractor(path, device="cpu"), out=tmp_path, resume=True)
    assert (tmp_path / "validation.csv").read_text() == rows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_all_stages_run_on_a_gpu(glands: Path, tmp_path: Path) -> None:
    for stage in ("encoder", "autoencoder", "ldm"):
        pretrain(
            stage,  # type: ignore[arg-type]
            pretrain_config(),
            data=glands,
            out=tmp_path,
            device="cuda",
        )
    network = load_extractor(tmp_path / "extractor.safetensors", device="cuda")
    config = train_config(loop={**LOOP, "steps": 4, "precision": "bf16"})
    written = train(config, GlaS(glands, "train"), network, out=tmp_path / "run")
    result = evaluate(load_model(written, device="cuda"), GlaS(glands, "train"))
    assert 0 <= result.pixel["dice"] <= 1


def test_classes_must_fit(glands: Path) -> None:
    with pytest.raises(DatasetError, match="are not the model's"):
        evaluate(load_model("stain-threshold", device="cpu"), GlaS(glands, "train"))


def test_command_line(glands: Path, pretrained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", "--dataset", "glas", "--data", str(glands), "--out", str(run)]
    arguments += ["--extractor", str(pretrained / "extractor.safetensors")]
    settings = [
        "mpp=1.0",
        "window_px=192",
        "resize_px=192",
        "head.name=fcn",
        "head.widths=[8, 8, 8]",
    ]
    settings += ["loop.steps=2", "loop.batch_size=2", "validate_every=2", "patch_tiles=[1, 1]"]
    settings += ["extractor.timesteps=[50, 200]", "extractor.taps=[3, 4, 12]"]
    for s in settings:
        arguments += ["--set", s]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "model.safetensors" in result.output
    assert len(load_model(run / "model.safetensors", device="cpu").extractor.specs) == 6

    arguments = ["evaluate", "--model", str(run / "model.safetensors"), "--dataset", "glas"]
    arguments += ["--data", str(glands), "--split", "train", "--out", str(tmp_path / "eval")]
    with pytest.warns(UserWarning, match="6 of the 6 images were in the model's training"):
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["images"] == 6
    card = read_card(run / "model.safetensors")["card"]
    assert card["dataset"]["name"] == "glas"
    assert card["dataset"]["part"] == "train"
    assert card["training_groups"] == [f"patient {i}" for i in range(1, 7)]
    assert card["extractor"]["licence"] == "unknown"
    assert card["extractor"]["pretraining"]["mpp"] == 1.0
    assert f"Dice {metrics['pixel']['dice']:.4f}" in result.output
    assert len((tmp_path / "eval" / "per_image.csv").read_text().splitlines()) == 7

    statements = tmp_path / "card.yaml"
    statements.write_text("use: tests\nlimits: [toy]\n")
    final = tmp_path / "final.safetensors"
    arguments = ["models", "card", str(run / "model.safetensors"), "--add", str(statements)]
    arguments += ["--metrics", str(tmp_path / "eval" / "metrics.json"), "--out", str(final)]
    assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    card = read_card(final)["card"]
    assert (card["use"], card["limits"]) == ("tests", ["toy"])
    assert card["metrics"]["glas train"]["dice"] == metrics["pixel"]["dice"]
    assert card["training"]["loop"]["steps"] == 2
    first, second = load_file(run / "model.safetensors"), load_file(final)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ldm": {"crop_px": 48}}, r"ldm\.crop_px 48: must be a multiple of 32"),
        ({"encoder": {"dino": {"local_px": 24}}}, r"encoder\.dino\.local_px 24: .* of 16"),
        ({"autoencoder": {"crop_px": 30}}, r"autoencoder\.crop_px 30: must be a multiple of 4"),
        ({"scale": [1.0, 0.5]}, r"scale \[1\.0, 0\.5\]"),
        ({"sources": []}, "at least one source"),
        (
            {"extractor": {**EXTRACTOR, "encoder": {**EXTRACTOR["encoder"], "heads": 3}}},  # type: ignore[dict-item]
            "dim 16 must be a multiple of heads 3",
        ),
        (
            {"extractor": {**EXTRACTOR, "unet": {**EXTRACTOR["unet"], "groups": 5}}},  # type: ignore[dict-item]
            r"unet: channels \[8, 8, 16, 16\] must be multiples of groups 5",
        ),
    ],
)
def test_pretraining_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pretrain_config(**changes)
