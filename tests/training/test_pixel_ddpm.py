"""Pretraining of the pixel-space denoisers, at toy size."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import wsiseg.training.loop as loop
from wsiseg.cli import main
from wsiseg.config import load_yaml
from wsiseg.datasets.augment import AugmentConfig
from wsiseg.errors import ConfigError, UsageError
from wsiseg.geometry import Point
from wsiseg.models.base import FeatureExtractor, to_tensor
from wsiseg.models.checkpoint import load_extractor, read_card
from wsiseg.models.diffusion import ScheduleConfig, alphas_bar
from wsiseg.models.registry import build_extractor
from wsiseg.training.denoising import draw_timesteps
from wsiseg.training.pixel_ddpm import (
    PixelDDPMConfig,
    PixelDDPMTask,
    save_estimates,
    timestep_errors,
)
from wsiseg.training.pretrain import pretrain
from wsiseg.training.pretrain_config import (
    PixelPretrainConfig,
    PretrainConfig,
    chosen_stages,
    pretrain_config,
)

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "pretrain").rglob("*.yaml"))
PLAIN = AugmentConfig(stain_gain=0.0, stain_shift=0.0)
NETWORKS: dict[str, dict[str, Any]] = {
    "genselfdiff": {"name": "genselfdiff", "dim": 8, "mults": [1, 2], "groups": 4, "tile_px": 32},
    "ddpm": {
        "name": "ddpm",
        "channels": [8, 16],
        "layers": 1,
        "attention": [2],
        "head_channels": 8,
        "groups": 4,
        "taps": [1, 2],
        "tile_px": 32,
    },
}
BOTH = pytest.mark.parametrize("name", list(NETWORKS))


def config(name: str, steps: int = 4, **changes: Any) -> PixelPretrainConfig:
    data = {
        "extractor": NETWORKS[name],
        "sources": [{"path": "*.png"}],
        "mpp": 1.0,
        "licence": "test",
        "crop_px": 16,
        "ddpm": {"weight": "p2" if name == "genselfdiff" else "none", "ema": 0.9},
        "loop": {
            "steps": steps,
            "batch_size": 4,
            "warmup_steps": 1,
            "learning_rate": 3e-3,
            "log_every": 2,
            "save_every": 2,
        },
        **changes,
    }
    made = pretrain_config(data)
    assert isinstance(made, PixelPretrainConfig)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of one colour each: what is noise in them is easily seen."""
    made = tmp_path_factory.mktemp("images")
    for i, colour in enumerate([(230, 170, 200), (120, 60, 150), (250, 240, 245), (180, 90, 160)]):
        Image.new("RGB", (48, 40), colour).save(made / f"{i}.png")
    return made


class Oracle(FeatureExtractor):
    """Knows the clean images, so it knows the noise."""

    def __init__(self, clean: torch.Tensor) -> None:
        super().__init__()
        self.alphas_bar = alphas_bar(ScheduleConfig(1000, 1e-4, 0.02, "linear"))
        self.clean = clean
        self.specs, self.tile_px = (), 16
        self.gain = torch.nn.Parameter(torch.ones(()))

    def predict_noise(self, noised: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        abar = self.alphas_bar[timesteps].view(-1, 1, 1, 1)
        return self.gain * (noised - abar.sqrt() * self.clean) / (1 - abar).sqrt()

    def forward(self, images: Any, places: Any, seed: int) -> Any:
        raise NotImplementedError


def pixels(count: int = 4) -> Any:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_error_is_that_of_the_noise() -> None:
    clean = to_tensor(pixels())
    task = PixelDDPMTask(Oracle(clean), PixelDDPMConfig(), PLAIN)
    assert float(task.losses(pixels(), 0, generator())["loss"].detach()) < 1e-6
    report = timestep_errors(task, clean, seed=0)
    assert set(report) == {"t10", "t50", "t150", "t250", "t500", "t900", "zero"}
    assert report.pop("zero") == pytest.approx(1, abs=0.1)
    assert max(report.values()) < 1e-6
    with torch.no_grad():
        task.average.gain.fill_(0.5)  # type: ignore[operator,union-attr]
    halved = timestep_errors(task, clean, seed=0)
    assert halved["t250"] == pytest.approx(0.25 * halved["zero"], rel=1e-4)


@pytest.mark.parametrize("weight", ["p2", "none"])
def test_errors_are_weighted_by_their_step(weight: Any) -> None:
    oracle = Oracle(to_tensor(pixels()))
    task = PixelDDPMTask(oracle, PixelDDPMConfig(weight=weight), PLAIN)
    seen: dict[str, torch.Tensor] = {}

    def errors(which: str, images: Any, t: torch.Tensor, noise: Any) -> torch.Tensor:
        assert which == "live"
        seen["t"] = t
        return torch.arange(1.0, 5.0)

    task.errors = errors  # type: ignore[method-assign]
    losses = task.losses(pixels(), 0, generator())
    abar = oracle.alphas_bar[seen["t"]].double()
    snr = abar / (1 - abar)
    expected = 1 / (1 + snr) if weight == "p2" else torch.ones(4)
    assert float(losses["loss"]) == pytest.approx(
        float((expected * torch.arange(1, 5)).mean()), rel=1e-4
    )
    assert float(losses["mse"]) == 2.5


def test_steps_are_drawn_alike() -> None:
    drawn = draw_timesteps(20_000, 10, 1.0, generator())
    shares = torch.bincount(drawn, minlength=10) / 20_000
    assert len(shares) == 10
    assert float((shares - 0.1).abs().max()) < 0.01
    assert float((draw_timesteps(20_000, 10, 2.0, generator()) < 3).float().mean()) > 0.5


def test_the_picture_shows_crops_noise_and_estimates(tmp_path: Path) -> None:
    clean = to_tensor(pixels(9))[:, :, :, :12]
    task = PixelDDPMTask(Oracle(clean[:8]), PixelDDPMConfig(), PLAIN)
    save_estimates(tmp_path / "estimates.png", task, clean, seed=0)
    with Image.open(tmp_path / "estimates.png") as file:
        sheet = np.asarray(file).astype(int)
    assert sheet.shape == (7 * 16, 8 * 12, 3)
    rows = sheet.reshape(7, 16, 8, 12, 3).transpose(0, 2, 1, 3, 4)
    crops = pixels(9)[:8, :, :12].astype(int)
    assert (rows[0] == crops).all()
    for estimate in rows[2::2]:  # the oracle's are the crops again
        assert np.abs(estimate - crops).max() <= 1
    distances = [float(np.abs(noised - crops).mean()) for noised in rows[1::2]]
    assert 5 < distances[0] < distances[1] < distances[2]
    assert [p.name for p in tmp_path.iterdir()] == ["estimates.png"]


@BOTH
def test_the_loss_goes_down_at_both_precisions(name: str, folder: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        changes = {"steps": 60, "save_every": 60, "log_every": 10, "learning_rate": 2e-2}
        made = config(name, loop={**vars(config(name).loop), **changes, "precision": precision})
        out = tmp_path / precision
        path = pretrain("ddpm", made, data=folder, out=out)
        rows = (out / "ddpm" / "log.csv").read_text().splitlines()
        column = rows[0].split(",").index("mse")
        values = [float(r.split(",")[column]) for r in rows[1:]]
        assert values[-1] < 0.85 * values[0]
        report = json.loads((out / "ddpm" / "metrics.json").read_text())
        assert report["t500"] < 0.95 * report["zero"]  # of an image it has not seen
        card = read_card(path)
        assert card["card"]["denoising_error"] == report
        assert card["card"]["pretraining"]["extractor"]["name"] == name
        assert card["licence"] == "test"
        # 8 crops of 16 px; one row of crops and two at each of three steps.
        with Image.open(out / "ddpm" / "estimates.png") as sheet:
            assert sheet.size == (8 * 16, 7 * 16)


@BOTH
def test_a_resumed_run_is_the_uninterrupted_run(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two batches a step, so that a wrong count of batches would show.
    made = config(name, loop={**vars(config(name).loop), "accumulate": 2})
    whole = pretrain("ddpm", made, data=folder, out=tmp_path / "whole")
    save = loop._save

    def stop(path: Path, task: Any, optimiser: Any, done: int, seconds: float) -> None:
        save(path, task, optimiser, done, seconds)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain("ddpm", made, data=folder, out=tmp_path / "half")
    half = pretrain("ddpm", made, data=folder, out=tmp_path / "half", resume=True)
    first, second = load_file(whole), load_file(half)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    for kept in ("metrics.json", "samples.png", "estimates.png"):
        ways = [(tmp_path / run / "ddpm" / kept).read_bytes() for run in ("whole", "half")]
        assert ways[0] == ways[1]


@BOTH
def test_the_averaged_weights_are_what_is_kept(name: str, folder: Path, tmp_path: Path) -> None:
    path = pretrain("ddpm", config(name), data=folder, out=tmp_path)
    state = torch.load(tmp_path / "ddpm" / "state.pt", weights_only=True)["module"]
    live = {k.removeprefix("live."): v for k, v in state.items() if k.startswith("live.")}
    written = load_extractor(path, device="cpu").state_dict()
    assert all(torch.equal(v, state["average." + k]) for k, v in written.items())
    assert any(not torch.equal(v, live[k]) for k, v in written.items())


@BOTH
def test_the_written_extractor_trains_on(name: str, folder: Path, tmp_path: Path) -> None:
    path = pretrain("ddpm", config(name), data=folder, out=tmp_path)
    extractor = load_extractor(path, device="cpu")
    parameters = extractor.trainable("all")
    for p in parameters:
        p.requires_grad_(True)
    images = torch.rand(2, 3, 32, 32, generator=generator()) * 2 - 1
    optimiser = torch.optim.Adam(parameters, lr=1e-3)
    losses = []
    for _ in range(8):
        maps = extractor(images, [Point(0, 0), Point(32, 0)], 0)
        assert [m.shape[1:] for m in maps] == [
            (s.channels, 32 // s.stride, 32 // s.stride) for s in extractor.specs
        ]
        loss = sum(((m - 1) ** 2).mean() for m in maps)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimiser.step()
        losses.append(float(loss.detach()))  # type: ignore[union-attr]
    assert losses[-1] < losses[0]


def test_stages_that_the_configuration_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config("genselfdiff")
    assert chosen_stages(made, []) == ("ddpm",)
    with pytest.raises(UsageError, match="stage ldm: the configuration has no such stage"):
        pretrain("ldm", made, data=tmp_path, out=tmp_path)
    latent = pretrain_config(load_yaml(next(p for p in CONFIGS if p.stem == "glas-small")))
    assert chosen_stages(latent, ["ldm", "encoder"]) == ("encoder", "ldm")
    small = next(p for p in CONFIGS if p.stem == "genselfdiff" and p.parent.name == "small")
    for stage in ("encoder", "nonsense"):
        command = ["wsiseg", "pretrain", stage, "--config", str(small)]
        command += ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        message = capsys.readouterr().err.splitlines()
        assert message == [
            f"wsiseg: error: stage {stage}: the configuration has no such stage; it has ddpm"
        ]
    assert not (tmp_path / "out").exists()


def test_the_command_runs_the_stage(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = {
        "extractor": NETWORKS["genselfdiff"],
        "sources": [{"path": "*.png"}],
        "crop_px": 16,
        "loop": {"steps": 9, "batch_size": 2},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(text))
    command = ["wsiseg", "pretrain", "--config", str(tmp_path / "c.yaml"), "--device", "cpu"]
    command += ["--data", str(folder), "--out", str(tmp_path / "run"), "--set", "loop.steps=2"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "extractor.safetensors" in capsys.readouterr().out
    assert (tmp_path / "run" / "extractor.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_px": 15}, r"crop_px 15: does not fit the network"),
        ({"ddpm": {"ema": 1.0}}, r"ddpm\.ema 1\.0: must be from 0 to below 1"),
        ({"ddpm": {"timestep_power": 0.0}}, r"ddpm\.timestep_power 0\.0: must be above 0"),
        ({"ddpm": {"weight": "snr"}}, r"ddpm\.weight: 'snr' is not one of p2, none"),
        ({"extractor": {"name": "stain"}}, r"extractor\.name: 'stain' is not one of genselfdiff"),
        ({"encoder": {}}, r"unknown key encoder"),
        ({"sources": []}, r"give at least one source"),
    ],
)
def test_configurations_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config("genselfdiff", **changes)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_load(path: Path) -> None:
    made = pretrain_config(load_yaml(path))
    named = "name" in load_yaml(path)["extractor"]
    assert type(made) is (PixelPretrainConfig if named else PretrainConfig)


def test_there_are_configs_of_each_network() -> None:
    made = {
        name: [p.stem for p in CONFIGS if load_yaml(p)["extractor"].get("name") == name]
        for name in NETWORKS
    }
    assert made == {  # as published, of few labels, and small
        "genselfdiff": ["few-labels", "genselfdiff", "genselfdiff"],
        "ddpm": ["ddpm-nuclei", "ddpm"],
    }


@BOTH
def test_small_configs_fit_a_cpu(name: str) -> None:
    path = next(p for p in CONFIGS if p.parent.name == "small" and p.stem == name)
    made = pretrain_config(load_yaml(path))
    assert isinstance(made, PixelPretrainConfig)
    count = sum(p.numel() for p in build_extractor(made.extractor).parameters())
    assert 1.5e6 < count < 4.5e6
