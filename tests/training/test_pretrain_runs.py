"""Stages that go on, build on one another and are measured while they run, or cannot be."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pretrain_toys import STAGES, made, report, stop_after
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wsiseg.cli.pretrain import command
from wsiseg.config import from_mapping
from wsiseg.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    DeviceMemoryError,
    SlideError,
    UsageError,
)
from wsiseg.geometry import Size
from wsiseg.models.checkpoint import load_extractor, read_card
from wsiseg.models.extractors.latent import FirstStageConfig, build_first_stage, encode
from wsiseg.models.extractors.vit import ViTConfig
from wsiseg.slides.phantom import write_phantom
from wsiseg.training import pretrain as module
from wsiseg.training import tile_places
from wsiseg.training.curves import draw_curves
from wsiseg.training.denoising import steps_at
from wsiseg.training.dino import DinoConfig, DinoTask
from wsiseg.training.loop import LoopConfig
from wsiseg.training.pretrain import check_stages, pretrain
from wsiseg.training.tile_pool import TilePool


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_stage_is_measured_while_it_runs(tissue: Path, tmp_path: Path) -> None:
    """At the steps that were asked for, once at the end; the weights are those without."""
    watched, plain = tmp_path / "watched", tmp_path / "plain"
    for stage, value in (("encoder", "spread"), ("autoencoder", "psnr"), ("ldm", "t10")):
        own: Any = stage
        a = pretrain(own, made(6, measure_every=2), data=tissue, out=watched)
        b = pretrain(own, made(6), data=tissue, out=plain)
        weights, others = load_file(a), load_file(b)
        assert all(torch.equal(weights[k], others[k]) for k in others)
        found = rows(watched / stage / "validation.csv")
        assert [r["step"] for r in found] == ["2", "4"]
        assert float(found[0][value]) != float(found[1][value])
        assert report(watched, stage) == report(plain, stage)
        assert not (plain / stage / "validation.csv").exists()
        draw_curves(watched / stage)
        with (
            Image.open(watched / stage / "curves.png") as with_panel,
            Image.open(plain / stage / "curves.png") as without,
        ):
            assert with_panel.height > without.height


def test_weights_are_kept_where_nothing_can_be_measured(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise SlideError("held.svs: damaged")

    for stage in STAGES:
        own: Any = stage
        pools = module.divide

        def damaged(*words: Any, pools: Any = pools, **options: Any) -> Any:
            found = pools(*words, **options)
            for name in ("batch", "read"):
                monkeypatch.setattr(found.held_out, name, broken)
            return found

        with monkeypatch.context() as patched:
            patched.setattr(module, "divide", damaged)
            with pytest.warns(UserWarning, match=rf"{stage}: could not be measured \(held\.svs"):
                pretrain(own, made(), data=tissue, out=tmp_path)
        assert not (tmp_path / stage / "metrics.json").exists()
    assert load_extractor(str(tmp_path / "extractor.safetensors"), device="cpu").tile_px == 32


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_written_before_they_are_measured(
    stage: Any, run: Path, tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that whatever ends the measurement does not take the training with it."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("a defect")

    name = {"ldm": "extractor"}.get(stage, stage)
    for before in ("encoder", "autoencoder"):
        shutil.copy(run / f"{before}.safetensors", tmp_path)
    (tmp_path / f"{name}.safetensors").unlink(missing_ok=True)
    report_of = {"ldm": "report_denoiser"}.get(stage, f"report_{stage}")
    with monkeypatch.context() as patched:
        patched.setattr(module, report_of, broken)
        with pytest.raises(RuntimeError, match="a defect"):
            pretrain(stage, made(), data=tissue, out=tmp_path)
    path = tmp_path / f"{name}.safetensors"
    written = load_file(path)
    pretrain(stage, made(), data=tissue, out=tmp_path, resume=True)
    assert all(torch.equal(v, written[k]) for k, v in load_file(path).items())


def test_a_complete_part_is_left_as_it_is(
    run: Path, tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale of latents differs in its last bits from machine to machine; a stage that was
    begun with a part goes on with it all the same."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "ldm")
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            pretrain("ldm", made(4), data=tissue, out=tmp_path / "run")
    statistics = module.latent_statistics

    def elsewhere(*words: Any) -> Any:
        found = statistics(*words)
        return replace(found, scale=found.scale * (1 + 1e-7))

    monkeypatch.setattr(module, "latent_statistics", elsewhere)
    for stage, steps in (("encoder", 2), ("autoencoder", 2), ("ldm", 4)):
        own: Any = stage
        pretrain(own, made(steps), data=tissue, out=tmp_path / "run", resume=True)


def test_the_card_tells_how_the_stages_ran(run: Path, tissue: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "ldm")
    changed = made(encoder={"crop_px": 48})
    path = pretrain("ldm", changed, data=tissue, out=tmp_path / "run")
    card = read_card(path)["card"]
    assert card["pretraining"]["encoder"]["crop_px"] == 32
    assert card["denoising_error"] == report(tmp_path / "run", "ldm")


def test_a_run_goes_on_with_what_has_no_effect(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory, logs, licence and later stages may change; what the weights depend on may not."""
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            pretrain("encoder", made(4), data=tissue, out=tmp_path)
    steps = {"steps": 7}
    changed = made(4, memory_gb=1.0, licence="mine", ldm={"loop": steps})
    other = replace(changed.encoder, loop=replace(changed.encoder.loop, log_every=1))
    changed = replace(changed, encoder=other, measure_every=3)
    resumed = pretrain("encoder", changed, data=tissue, out=tmp_path, resume=True)
    whole = pretrain("encoder", made(4), data=tissue, out=tmp_path / "whole")
    assert all(torch.equal(v, load_file(whole)[k]) for k, v in load_file(resumed).items())
    refused = ({"encoder": {"loop": steps}}, {"mpp": 0.7}, {"scale": (1.0, 1.0)})
    for change in refused:
        with pytest.raises(UsageError, match="another configuration"):
            pretrain("encoder", made(4, **change), data=tissue, out=tmp_path, resume=True)


def test_parts_of_another_network_are_refused(run: Path, tissue: Path, tmp_path: Path) -> None:
    """Heads and groups do not show in the shapes of the weights."""
    config = made()
    own = config.extractor
    for changed, message in (
        (replace(own, encoder=replace(own.encoder, heads=4)), r"encoder.*heads was 2 and is 4"),
        (
            replace(own, first_stage=replace(own.first_stage, groups=2)),
            r"autoencoder.*groups was 4 and is 2",
        ),
    ):
        for stage in ("encoder", "autoencoder"):
            shutil.copy(run / f"{stage}.safetensors", tmp_path)
        with pytest.raises(CheckpointError, match=message):
            pretrain("ldm", replace(config, extractor=changed), data=tissue, out=tmp_path)
    with pytest.raises(CheckpointError, match=r"mpp was 1.0 and is 0.5"):
        pretrain("ldm", made(mpp=0.5), data=tissue, out=tmp_path)


def test_parts_that_are_none(run: Path, tissue: Path, tmp_path: Path) -> None:
    weights = load_file(run / "encoder.safetensors")
    shutil.copy(run / "autoencoder.safetensors", tmp_path)
    path = tmp_path / "encoder.safetensors"
    save_file(weights, path, metadata={"wsiseg.part": "{}"})
    with pytest.raises(CheckpointError, match="does not fit the configuration"):
        pretrain("ldm", made(), data=tissue, out=tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors: cannot be read"):
        pretrain("ldm", made(), data=tissue, out=tmp_path)
    path.rmdir()
    with pytest.raises(CheckpointError, match="run the stage encoder first"):
        pretrain("ldm", made(), data=tissue, out=tmp_path)
    shutil.copy(run / "encoder.safetensors", tmp_path)
    (tmp_path / "autoencoder.safetensors").unlink()
    meta = {"wsiseg.part": '{"network": {"kind": "none"}, "mpp": 1.0}'}
    first_stage = load_file(run / "autoencoder.safetensors")
    save_file(first_stage, tmp_path / "autoencoder.safetensors", metadata=meta)
    with pytest.raises(CheckpointError, match=r"autoencoder.*does not fit the configuration"):
        pretrain("ldm", made(), data=tissue, out=tmp_path)


def test_a_stage_goes_on_with_its_own_parts_only(
    run: Path, tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("encoder.safetensors", "autoencoder.safetensors")
    for name in names:
        shutil.copy(run / name, tmp_path)
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            pretrain("ldm", made(4), data=tissue, out=tmp_path)
    other = pretrain("encoder", made(3), data=tissue, out=tmp_path / "other")
    shutil.copy(other, tmp_path)
    with pytest.raises(UsageError, match=r"started with another encoder\.safetensors"):
        pretrain("ldm", made(4), data=tissue, out=tmp_path, resume=True)
    shutil.copy(run / names[0], tmp_path)
    pretrain("ldm", made(4), data=tissue, out=tmp_path, resume=True)


def test_other_files_than_the_stages_before_are_told(
    run: Path, tissue: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "ldm")
    with pytest.warns(UserWarning, match="ldm: the files are not those of the stage encoder"):
        pretrain("ldm", made(validation_share=0.5), data=tissue, out=tmp_path / "run")


def test_a_part_is_no_extractor(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"one stage's part .* extractor\.safetensors"):
        load_extractor(str(run / "encoder.safetensors"), device="cpu")


def test_tissue_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_phantom(tmp_path / "a.tiff", size=Size(1024, 1024), seed=1, mpp=1.0)
    write_phantom(tmp_path / "b.tiff", size=Size(1024, 1024), seed=2, mpp=1.0)
    config = made(sources=[{"path": "*.tiff"}], validation_share=0.5)
    pretrain("encoder", config, data=tmp_path, out=tmp_path / "out")

    def twice(*_: Any) -> None:
        raise SlideError("looked for again")

    monkeypatch.setattr(tile_places, "find_tissue", twice)
    pretrain("autoencoder", config, data=tmp_path, out=tmp_path / "out")
    with pytest.raises(DatasetError, match="looked for again"):
        pretrain("encoder", config, data=tmp_path, out=tmp_path / "new")


def test_small_images_are_told(tissue: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="magnif"):
        pretrain("encoder", made(encoder={"crop_px": 96}), data=tissue, out=tmp_path)


def test_all_stages_are_checked_before_the_first(
    run: Path, tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run / "ldm", tmp_path / "begun" / "ldm")
    words = ["--config", "slides", "--data", str(tissue), "--out", str(tmp_path / "begun")]
    done = CliRunner().invoke(command, [*words, "--device", "cpu"])
    assert isinstance(done.exception, UsageError)
    assert "ldm: holds a run already; give --resume" in str(done.exception)
    assert not (tmp_path / "begun" / "encoder").exists()

    class Three:
        count, index, first = 3, 0, True

    config = made(encoder={"loop": {"batch_size": 3}})
    check_stages(STAGES, config, out=tmp_path / "new")  # type: ignore[arg-type]
    monkeypatch.setattr(module, "Processes", Three)
    check_stages(["encoder"], config, out=tmp_path / "new")
    with pytest.raises(
        ConfigError, match=r"^autoencoder\.loop\.batch_size: must be a multiple of 3"
    ):
        check_stages(STAGES, config, out=tmp_path / "new")  # type: ignore[arg-type]


def test_latents_are_scaled_by_many_crops_whatever_the_batch(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics, found = module.latent_statistics, []

    def spy(network: Any, config: Any, batches: Any) -> Any:
        found.append(torch.cat([*batches]))
        return statistics(network, config, found[-1].split(5))

    monkeypatch.setattr(module, "latent_statistics", spy)
    for size in (1, 2):
        config = made(1, autoencoder={"loop": {"steps": 1, "batch_size": size}})
        path = pretrain("autoencoder", config, data=tissue, out=tmp_path / str(size))
    assert found[0].shape == (32, 3, 32, 32)
    assert torch.equal(*found)
    assert len({crop.numpy().tobytes() for crop in found[0]}) == 32
    with safe_open(path, "pt") as file:
        part = json.loads(file.metadata()["wsiseg.part"])
    held = from_mapping(FirstStageConfig, part["network"])
    network = build_first_stage(held)
    network.load_state_dict(load_file(path))
    with torch.no_grad():
        latents = encode(network, held, found[1])
    assert float(latents.mean()) == pytest.approx(0, abs=1e-4)
    assert float(latents.std()) == pytest.approx(1, abs=1e-4)


def test_a_lack_of_memory_is_said_in_a_line(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(TilePool, "batch", full)
    config = ["--config", "small/pathsegdiff", "--data", str(tissue), "--out", str(tmp_path / "o")]
    sources = ["--set", "sources=[{path: '*.png'}]", "--set", "mpp=1.0"]
    with pytest.warns(UserWarning, match="magnif"):
        done = CliRunner().invoke(command, ["encoder", *config, *sources, "--device", "cpu"])
    assert isinstance(done.exception, DeviceMemoryError)
    assert "out of memory" in str(done.exception)
    assert "loop.batch_size" in str(done.exception)


def test_the_last_layer_is_frozen_at_first() -> None:
    loop = LoopConfig(steps=4)
    config = DinoConfig(
        global_px=32,
        local_px=16,
        local_count=1,
        prototypes=8,
        hidden=24,
        bottleneck=6,
        freeze_steps=2,
        mask_share=0.5,
    )
    vit = ViTConfig(dim=16, depth=1, heads=2, patch_px=16, position_px=32)
    task = DinoTask(vit, config, made().augment, loop)
    student: Any = task.module["student"]
    assert student["head"].prototypes.shape == (8, 6)
    assert student["head"].mlp[0].out_features == 24
    batch = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8)
    for step in range(4):
        student.zero_grad(set_to_none=True)
        task.losses(batch, step, torch.Generator().manual_seed(step))["loss"].backward()  # type: ignore[no-untyped-call]
        for name in ("head", "patch_head"):
            assert (student[name].prototypes.grad is None) == (step < 2)
            assert student[name].mlp[0].weight.grad is not None
        task.after_step(step, 0.0)


def test_reported_steps_are_steps() -> None:
    assert steps_at((0.01, 0.5, 0.9), 1000) == [10, 500, 900]
    assert steps_at((0.01, 0.5, 0.9), 4) == [0, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": {"crop_px": 0}}, "encoder.crop_px 0"),
        ({"memory_gb": float("inf")}, "memory_gb: inf"),
        ({"mpp": float("nan")}, "mpp: nan"),
        ({"measure_every": -1}, "measure_every -1"),
        ({"sources": [{"path": "*", "weight": float("inf")}]}, r"weight: inf"),
        (
            {"augment": {"scale": (0.5, 2.0)}},
            r"augment\.scale: has no effect here; crops are varied",
        ),
        ({"augment": {"rotate": False}}, r"augment\.rotate: has no effect"),
        ({"augment": {"elastic_px": 4.0}}, r"augment\.elastic_px: has no effect"),
    ],
)
def test_values_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**change)


def test_any_seed_is_one(tissue: Path, tmp_path: Path) -> None:
    pretrain("encoder", made(seed=10**14), data=tissue, out=tmp_path)
    assert (tmp_path / "encoder.safetensors").exists()
