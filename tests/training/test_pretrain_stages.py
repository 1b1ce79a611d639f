"""What the stages write: numbers on held-out images, pictures, the same from several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pretrain_toys import STAGES, made, report, stop_after
from safetensors.torch import load_file, save_file

from wsiseg.config import load_yaml
from wsiseg.errors import CheckpointError, ConfigError, UsageError
from wsiseg.geometry import Size
from wsiseg.models.extractors.pathsegdiff import PathSegDiffConfig, PathSegDiffExtractor
from wsiseg.models.extractors.vit import ViT
from wsiseg.slides.phantom import write_phantom
from wsiseg.training import loop
from wsiseg.training.parts import made_of
from wsiseg.training.pretrain import PretrainConfig, pretrain
from wsiseg.training.pretrain_config import pretrain_config
from wsiseg.training.pretrain_report import Measured, report_encoder
from wsiseg.training.tiles import load_pools


def test_every_stage_has_numbers_and_a_picture(run: Path) -> None:
    encoder, autoencoder, ldm = (report(run, s) for s in STAGES)
    assert all(r["held_out_images"] == 4 for r in (encoder, autoencoder, ldm))
    assert set(encoder) == {
        "held_out_images",
        "majority",
        *(p + n for p in ("", "random_") for n in ("knn_accuracy", "spread", "effective_rank")),
    }
    assert encoder["majority"] == 0.5
    assert set(autoencoder) == {"held_out_images", "psnr", "ssim", "l1", "codes_used"}
    assert 1 / 16 <= autoencoder["codes_used"] <= 1
    assert {"conditioned", "null", "shuffled", "t10", "t500_null"} <= set(ldm)
    sizes = {
        "encoder/neighbours.png": (8 * 32 + 7 * 4, 4 * 32 + 3 * 4),
        "autoencoder/reconstructions.png": (8 * 32 + 7 * 4, 2 * 32 + 4),
        "ldm/samples.png": (4 * 32 + 3 * 4, 2 * 32 + 4),
    }
    for name, size in sizes.items():
        with Image.open(run / name) as picture:
            assert picture.size == size, name


def test_vectors_that_tell_the_labels_apart_are_seen_to(tissue: Path, tmp_path: Path) -> None:
    config = made()
    pools = load_pools(config.sources, tissue, mpp=1.0, validation_share=0.25)
    measured = Measured(pools, 32, 0, torch.device("cpu"))
    torch.manual_seed(0)

    class Mean(ViT):
        """Says how dark an image is."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            mean = images.mean(dim=(1, 2, 3))
            return torch.stack((mean, torch.ones_like(mean)), dim=1)

    class Constant(ViT):
        """Says nothing."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(images), 3)

    good = report_encoder(Mean(config.extractor.encoder), measured, tmp_path)
    assert good["knn_accuracy"] == 1
    none = report_encoder(Constant(config.extractor.encoder), measured, tmp_path)
    assert none["knn_accuracy"] == 0.5
    assert (none["spread"], none["effective_rank"]) == pytest.approx((0, 1), abs=1e-4)
    assert none["random_spread"] == good["random_spread"]


def test_neighbours_are_pictured_beside_their_query(tissue: Path, run: Path) -> None:
    with Image.open(run / "encoder" / "neighbours.png") as file:
        sheet = np.asarray(file).astype(int)
    config = made()
    pools = load_pools(config.sources, tissue, mpp=1.0, validation_share=0.25)
    assert pools.held_out is not None
    queries = [v.file.view(32).astype(int) for v in pools.held_out.views(300)]
    bank = [v.file.view(32).astype(int) for v in pools.training.views(1000)]
    for row, query in enumerate(queries):
        strip = sheet[row * 36 : row * 36 + 32]
        assert np.array_equal(strip[:, :32], query)
        for column in range(1, 8):
            shown = strip[:, column * 36 : column * 36 + 32]
            assert any(np.array_equal(shown, image) for image in bank)


def test_the_encoder_is_measured_on_crops_no_larger_than_it_learns_from(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = []

    def spy(encoder: Any, measured: Measured, folder: Path) -> dict[str, float]:
        sides.append(measured.size_px)
        return {"spread": 1.0}

    monkeypatch.setattr("wsiseg.training.pretrain.report_encoder", spy)
    for crop, tile in ((40, 64), (48, 32)):
        config = made(1, extractor={"tile_px": tile}, encoder={"crop_px": crop})
        pretrain("encoder", config, data=tissue, out=tmp_path / str(crop))
    assert sides == [32, 32]  # multiples of the patch, 16


def test_without_labels_or_held_out_images(tissue: Path, tmp_path: Path) -> None:
    config = made(sources=[{"path": "light_*.png"}], validation_share=0.0)
    pretrain("encoder", config, data=tissue, out=tmp_path)
    found = report(tmp_path, "encoder")
    assert found["held_out_images"] == 0
    assert not any("knn" in name for name in found)


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """Two slides, and one that is none."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for name, seed in (("a", 1), ("c", 2)):
        write_phantom(folder / f"{name}.tiff", Size(1536, 1024), mpp=0.5, seed=seed)
    (folder / "b.tiff").write_text("no slide")
    return folder


def test_one_held_out_slide_is_measured_in_many_places(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsiseg.training.pretrain_report.BANK", 60)
    monkeypatch.setattr("wsiseg.training.pretrain_report.QUERIES", 20)
    config = made(sources=[{"path": "*.tiff"}], validation_share=0.5)
    with pytest.warns(UserWarning, match=r"b\.tiff: not a slide or image .* it is left out"):
        pretrain("encoder", config, data=slides, out=tmp_path)
    found = report(tmp_path, "encoder")
    assert found["held_out_images"] == 1
    assert found["spread"] > 0.01
    assert found["random_spread"] > 0.01
    assert 1.1 < found["effective_rank"] <= 16
    with Image.open(tmp_path / "encoder" / "neighbours.png") as file:
        assert file.size == (8 * 32 + 7 * 4, 8 * 32 + 7 * 4)
    with pytest.warns(UserWarning, match="it is left out"):
        pretrain("encoder", config, data=slides, out=tmp_path, resume=True)
    assert report(tmp_path, "encoder") == found


def test_a_run_goes_on_with_its_slides_only(slides: Path, tmp_path: Path) -> None:
    config = made(sources=[{"path": "*.tiff"}], validation_share=0.5)
    with pytest.warns(UserWarning, match="it is left out"):
        pretrain("autoencoder", config, data=slides, out=tmp_path)
    (slides / "b.tiff").unlink()
    pretrain("autoencoder", config, data=slides, out=tmp_path, resume=True)
    (slides / "b.tiff").symlink_to(slides / "a.tiff")
    with pytest.raises(UsageError, match=r"was started without b\.tiff; take it away, or use anot"):
        pretrain("autoencoder", config, data=slides, out=tmp_path, resume=True)
    (slides / "b.tiff").unlink()
    (slides / "c.tiff").write_bytes(b"gone bad")
    with (
        pytest.warns(UserWarning, match=r"c\.tiff: .* it is left out"),
        pytest.raises(UsageError, match=r"was started with c\.tiff, which is not there or cannot"),
    ):
        pretrain("autoencoder", config, data=slides, out=tmp_path, resume=True)


RICH = {
    "laplacian_weight": 0.5,
    "feature_weight": 0.1,
    "discriminator": {"weight": 0.3, "channels": 8, "layers": 1, "start_step": 1},
}


@pytest.mark.parametrize("stage", ["encoder", "autoencoder"])
def test_a_resumed_run_with_all_options_is_the_uninterrupted_one(
    stage: Any, run: Path, tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = made(4, autoencoder={"autoencoder": RICH})
    written = []
    for name in ("whole", "half"):
        (tmp_path / name).mkdir()
        weights = load_file(run / "encoder.safetensors")
        if stage == "autoencoder":
            meta = json.dumps(made_of(config.extractor.encoder, config.mpp))
            path = tmp_path / name / "encoder.safetensors"
            save_file(weights, path, metadata={"wsiseg.part": meta})
    whole = pretrain(stage, config, data=tissue, out=tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            pretrain(stage, config, data=tissue, out=tmp_path / "half")
    half = pretrain(stage, config, data=tissue, out=tmp_path / "half", resume=True)
    written = [load_file(p) for p in (whole, half)]
    assert all(torch.equal(written[0][k], written[1][k]) for k in written[0])
    assert report(tmp_path / "whole", stage) == report(tmp_path / "half", stage)
    if stage == "autoencoder":
        assert not any("discriminator" in k for k in written[0])
        rows = (tmp_path / "whole" / stage / "log.csv").read_text().splitlines()
        assert {"laplacian", "features", "fooling", "telling"} <= set(rows[0].split(","))
        without = pretrain(stage, made(4), data=tissue, out=tmp_path / "without")
        other = load_file(without)
        assert any(not torch.equal(other[k], written[0][k]) for k in other)


def test_options_that_do_not_fit(tissue: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of 16 for feature_weight"):
        made(autoencoder={"crop_px": 24, "autoencoder": {"feature_weight": 1.0}})
    with pytest.raises(ConfigError, match="the discriminator needs 64 px"):
        made(autoencoder={"autoencoder": {"discriminator": {"weight": 1.0, "layers": 4}}})
    with pytest.raises(ConfigError, match="validation_share"):
        made(validation_share=1.0)
    with pytest.raises(ConfigError, match="memory_gb"):
        made(memory_gb=0.0)
    config = made(autoencoder={"autoencoder": RICH})
    with pytest.raises(CheckpointError, match="run the stage encoder first"):
        pretrain("autoencoder", config, data=tissue, out=tmp_path)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_pretrain_stages import STAGES, made
from wsiseg.training.pretrain import pretrain
from wsiseg.training.processes import Processes
for stage in STAGES:
    pretrain(stage, made(), data=Path({data!r}), out=Path({out!r}))
    sys.stdout.write("process %d of %d\\n" % (Processes().index, Processes().count))
Processes().end()
"""


def launched(script: Path) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launch, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_two_processes_train_what_one_does(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process that computes both shares, each with the noise of its process."""
    script = tmp_path / "run.py"
    names = {"folder": str(Path(__file__).parent), "data": str(tissue)}
    script.write_text(SCRIPT.format(**names, out=str(tmp_path / "two")))
    done = launched(script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(f"process {i} of 2" in done.stdout for i in range(2))
    gradients = loop._gradients

    def both(task: Any, batches: Any, config: Any, step: int, seeds: Any) -> dict[str, float]:
        batch, sums, values = next(batches), [], {}
        for index in range(2):
            values = gradients(task, iter([batch[index::2]]), config, step, (seeds[0], index))
            sums.append([p.grad.clone() for p in task.parameters()])
        for p, a, b in zip(task.parameters(), *sums, strict=True):
            p.grad = (a + b) / 2
        return values

    monkeypatch.setattr(loop, "_gradients", both)
    for stage in STAGES:
        pretrain(stage, made(), data=tissue, out=tmp_path / "one")  # type: ignore[arg-type]
    for name in ("encoder", "autoencoder", "extractor"):
        one, two = (load_file(tmp_path / n / f"{name}.safetensors") for n in ("one", "two"))
        for key, value in one.items():
            assert torch.allclose(value.float(), two[key].float(), atol=1e-5), (name, key)
    for stage in STAGES:
        a, b = (report(tmp_path / n, stage) for n in ("one", "two"))
        assert a == pytest.approx(b, abs=1e-3)
        rows = (tmp_path / "two" / stage / "log.csv").read_text().splitlines()
        assert len(rows) == 2
    states = [
        torch.load(tmp_path / n / "encoder" / "state.pt", weights_only=True)["module"]
        for n in ("one", "two")
    ]
    for centre in ("centre", "patch_centre"):
        assert torch.allclose(states[0][centre], states[1][centre], atol=1e-6)
        assert float(states[0][centre].abs().max()) > 0


def test_a_batch_that_cannot_be_shared(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Three:
        count, index, first = 3, 0, True

    monkeypatch.setattr("wsiseg.training.pretrain.Processes", Three)
    with pytest.raises(ConfigError, match="must be a multiple of 3 processes"):
        pretrain("encoder", made(), data=tissue, out=tmp_path)


def test_the_full_size_fits_its_parts() -> None:
    """PathSegDiff as published, on the meta device: all shapes, no memory."""
    root = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
    config = pretrain_config(load_yaml(root / "pathsegdiff-gpu.yaml"))
    assert isinstance(config, PretrainConfig)
    published = PathSegDiffConfig()
    assert config.extractor.encoder == published.encoder
    assert config.extractor.unet == published.unet
    assert config.extractor.first_stage == published.first_stage
    assert config.extractor.schedule == published.schedule
    with torch.device("meta"):
        network: Any = PathSegDiffExtractor(config.extractor)
        side = config.ldm.crop_px
        images = torch.zeros(2, 3, side, side, device="meta")
        latents = network.first_stage.quant_conv(network.first_stage.encoder(images))
        assert latents.shape == (2, 3, side // 4, side // 4)
        context = network.conditioner(network.encoder(images))
        noise = network.unet(latents, torch.zeros(2, device="meta"), context).sample
    assert noise.shape == latents.shape
