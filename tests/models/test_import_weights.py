"""The authors' checkpoints, in their layout at reduced width, come out in the right places."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from compvis_layout import Originals, schedule

from wsiseg.cli.models import command
from wsiseg.errors import CheckpointError, UsageError
from wsiseg.geometry import Point
from wsiseg.models.checkpoint import load_extractor, load_model, read_card
from wsiseg.models.diffusion import place_noise
from wsiseg.models.extractors.pathsegdiff import PathSegDiffExtractor
from wsiseg.models.registry import extractor_mapping
from wsiseg.models.weights import import_weights

KINDS: dict[str, dict[str, Any]] = {
    "vq": {},
    "kl": {"latent": 4, "levels": (32, 32, 32, 64), "codes": 0},
}


@pytest.fixture(scope="module", params=list(KINDS))
def imported(request: Any, tmp_path_factory: Any) -> tuple[Originals, PathSegDiffExtractor, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    originals = Originals(**KINDS[request.param])
    ldm = originals.write_ldm(folder / "last.ckpt")
    hipt = originals.write_hipt(folder / "vit.pth")
    out = folder / "model.safetensors"
    import_weights(ldm, hipt, out=out)
    extractor = load_extractor(out, device="cpu")
    assert isinstance(extractor, PathSegDiffExtractor)
    return originals, extractor, out


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert float(theirs.abs().max()) > 0.01
    assert float((ours - theirs).abs().max()) <= tolerance


@torch.inference_mode()
def test_all_taps_equal_an_independent_forward(imported: Any) -> None:
    originals, extractor, _ = imported
    side = 128  # smaller than the tile of 256, for speed: every part takes any size
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(7)) * 2 - 1
    places = [Point(0, 0), Point(512, 256)]
    latents = originals.autoencoder.quant_conv(originals.autoencoder.encoder(images))
    latents = latents[:, : originals.latent] * extractor.config.first_stage.scale
    noise = place_noise(places, 11, 50, tuple(latents.shape[1:]))
    product = schedule()[1][50]
    noised = float(product**0.5) * latents + float((1 - product) ** 0.5) * noise
    context = originals.condition(images)
    theirs, _ = originals.unet.blocks(noised, 50, context)
    ours = extractor(images, places, 11)
    assert len(ours) == len(theirs) == 13
    close(extractor.context(images), context)
    for mine, original, spec in zip(ours, theirs, extractor.specs, strict=True):
        assert mine.shape[1:] == (spec.channels, side // spec.stride, side // spec.stride)
        close(mine, original)
    changed = originals.unet.blocks(noised, 50, -context)[0]
    assert float((changed[-1] - theirs[-1]).abs().max()) > 1e-2  # the context takes part


@torch.inference_mode()
def test_latents_and_decoder_equal_an_independent_forward(imported: Any) -> None:
    originals, extractor, _ = imported
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(8)) * 2 - 1
    first, theirs = extractor.first_stage, originals.autoencoder
    expected = theirs.quant_conv(theirs.encoder(images))
    close(first.quant_conv(first.encoder(images)), expected)
    latent = expected[:, : originals.latent]
    close(
        first.decoder(first.post_quant_conv(latent)), theirs.decoder(theirs.post_quant_conv(latent))
    )
    if extractor.config.first_stage.kind == "vq":
        assert torch.equal(first.quantize.embedding.weight, theirs.quantize.embedding.weight)


def test_widths_are_read_off_the_tensors(imported: Any) -> None:
    originals, extractor, _ = imported
    config = extractor.config
    assert config.unet.channels == originals.widths
    assert config.unet.context_dim == originals.context
    assert config.encoder.dim == originals.dim
    assert (config.encoder.depth, config.encoder.heads, config.encoder.position_px) == (2, 2, 224)
    assert config.region_dim == 40
    assert config.first_stage.latent_channels == originals.latent
    assert (config.schedule.beta_start, config.schedule.beta_end) == (0.0015, 0.0195)


def test_card_says_what_was_imported(imported: Any) -> None:
    _, _, out = imported
    metadata = read_card(out)
    assert metadata["kind"] == "extractor"
    assert metadata["card"]["sources"]["ldm"]["file"] == "last.ckpt"
    assert metadata["card"]["left_out"] == {"inception.": 1}
    assert metadata["card"]["schedule"] == "equal to the one in the file"
    with pytest.raises(CheckpointError, match=r"without a head; train one .*'wsiseg train'"):
        load_model(out, device="cpu")


def test_null_conditioning_of_the_same_weights(imported: Any) -> None:
    originals, _, out = imported
    extractor = load_extractor(out, device="cpu", options={"conditioning": "null"})
    assert isinstance(extractor, PathSegDiffExtractor)
    images = torch.rand(1, 3, 64, 64)
    expected = torch.stack((originals.patch_fc.bias, originals.region_fc.bias))
    assert torch.allclose(extractor.context(images)[0], expected)


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: Any) -> tuple[Originals, Path]:
    originals = Originals()
    return originals, originals.write_hipt(tmp_path_factory.mktemp("hipt") / "vit.pth")


@pytest.fixture
def files(reduced: tuple[Originals, Path], tmp_path: Path) -> tuple[Originals, Path, Path, Path]:
    originals = copy.copy(reduced[0])
    originals.state = dict(originals.state)
    ldm = originals.write_ldm(tmp_path / "last.ckpt")
    return originals, ldm, reduced[1], tmp_path / "o.safetensors"


UNET = "model.diffusion_model."


def test_a_missing_tensor_is_named(files: Any) -> None:
    originals, ldm, hipt, out = files
    del originals.state[f"{UNET}output_blocks.7.1.proj_in.bias"]
    originals.write_ldm(ldm)
    with pytest.raises(
        CheckpointError, match=r"U-Net: tensor up_blocks\.2\.attentions\.1.*missing"
    ):
        import_weights(ldm, hipt, out=out)
    assert not out.exists()


def test_an_unexpected_tensor_is_named(files: Any) -> None:
    originals, ldm, hipt, out = files
    originals.state[f"{UNET}input_blocks.1.1.proj_in.weight"] = torch.ones(3, 3)
    originals.write_ldm(ldm)
    with pytest.raises(CheckpointError, match=r"has no place"):
        import_weights(ldm, hipt, out=out)
    del originals.state[f"{UNET}input_blocks.1.1.proj_in.weight"]
    originals.state[f"{UNET}label_emb.weight"] = torch.ones(3, 3)
    originals.write_ldm(ldm)
    with pytest.raises(CheckpointError, match=r"label_emb.weight has no place"):
        import_weights(ldm, hipt, out=out)
    del originals.state[f"{UNET}label_emb.weight"]
    originals.state["control_model.weight"] = torch.ones(3)
    originals.write_ldm(ldm)
    with pytest.raises(CheckpointError, match=r"control_model.weight belongs to no part"):
        import_weights(ldm, hipt, out=out)


def test_a_wrong_shape_is_named(files: Any) -> None:
    originals, ldm, hipt, out = files
    originals.state["first_stage_model.encoder.mid.block_2.conv1.weight"] = torch.ones(64, 3, 3, 3)
    originals.write_ldm(ldm)
    with pytest.raises(CheckpointError, match=r"first stage: .* \[64, 3, 3, 3\] where"):
        import_weights(ldm, hipt, out=out)


def test_a_first_stage_tensor_that_is_missing_is_named(files: Any) -> None:
    originals, ldm, hipt, out = files
    del originals.state["first_stage_model.decoder.mid.attn_1.k.weight"]
    originals.write_ldm(ldm)
    with pytest.raises(
        CheckpointError, match=r"first stage: tensor decoder.*to_k.weight is missing"
    ):
        import_weights(ldm, hipt, out=out)


def test_other_conditioning_is_refused(files: Any) -> None:
    originals, ldm, hipt, out = files
    originals.state["cond_stage_model.patch_fc.weight"] = torch.ones(48, 768)
    originals.write_ldm(ldm)
    with pytest.raises(CheckpointError, match=r"guided by vectors of 768 .* not iBOT"):
        import_weights(ldm, hipt, out=out)
    del originals.state["cond_stage_model.patch_fc.weight"]
    originals.write_ldm(ldm)
    with pytest.raises(CheckpointError, match=r"no cond_stage_model.patch_fc"):
        import_weights(ldm, hipt, out=out)


def test_one_token_without_region(files: Any) -> None:
    originals, ldm, hipt, out = files
    for name in ("weight", "bias"):
        del originals.state[f"cond_stage_model.region_fc.{name}"]
    originals.write_ldm(ldm)
    import_weights(ldm, hipt, out=out)
    extractor: Any = load_extractor(out, device="cpu")
    assert extractor.context(torch.rand(1, 3, 64, 64)).shape == (1, 1, originals.context)


def test_another_noise_schedule_is_refused(files: Any) -> None:
    originals, ldm, hipt, out = files
    betas = torch.linspace(0.0015, 0.0195, 1000)
    originals.state["betas"] = betas
    originals.state["alphas_cumprod"] = torch.cumprod(1 - betas, 0)
    originals.write_ldm(ldm)
    with pytest.raises(CheckpointError, match="noise schedule is not scaled_linear"):
        import_weights(ldm, hipt, out=out)


def test_another_scale_of_the_latents_is_refused_unless_read_off(files: Any) -> None:
    originals, ldm, hipt, out = files
    originals.state["scale_factor"] = torch.tensor(0.31)
    originals.write_ldm(ldm)
    import_weights(ldm, hipt, out=out)
    read_off = json.loads(json.dumps(extractor_mapping(load_extractor(out, device="cpu"))))
    assert read_off["first_stage"]["scale"] == pytest.approx(0.31)
    read_off["first_stage"]["scale"] = 1.0
    with pytest.raises(CheckpointError, match=r"scaled by 0\.31, not 1;"):
        import_weights(ldm, hipt, out=out.with_name("other.safetensors"), arch=read_off)


def test_moving_average_only_when_asked(files: Any) -> None:
    originals, ldm, hipt, out = files
    plain = {n: t for n, t in originals.state.items() if n.startswith(UNET)}
    with pytest.raises(CheckpointError, match="no moving average of"):
        import_weights(ldm, hipt, out=out, ema=True)
    for name, tensor in plain.items():
        short = name.removeprefix("model.").replace(".", "")
        originals.state[f"model_ema.{short}"] = tensor + 1
    originals.state["model_ema.decay"] = torch.tensor(0.9999)
    originals.write_ldm(ldm)
    for ema, offset in ((False, 0.0), (True, 1.0)):
        card = import_weights(ldm, hipt, out=out, ema=ema)
        extractor: Any = load_extractor(out, device="cpu")
        expected = originals.unet.state_dict()["input_blocks.0.0.weight"] + offset
        assert torch.equal(extractor.unet.conv_in.weight, expected)
        assert card["unet_weights"] == ("exponential moving average" if ema else "plain")
        out.unlink()


def test_files_of_another_kind(files: Any, tmp_path: Path) -> None:
    _, ldm, hipt, out = files
    with pytest.raises(CheckpointError, match=r"no model\.diffusion_model"):
        import_weights(hipt, hipt, out=out)
    with pytest.raises(CheckpointError, match="no 'teacher'; expected HIPT"):
        import_weights(ldm, ldm, out=out)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(ldm.read_bytes()[: ldm.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"cut.ckpt: damaged or truncated"):
        import_weights(cut, hipt, out=out)
    text = tmp_path / "page.ckpt"
    text.write_text("<html>quota exceeded</html>")
    with pytest.raises(CheckpointError, match="not a torch checkpoint"):
        import_weights(text, hipt, out=out)
    empty = tmp_path / "empty.ckpt"
    empty.touch()
    with pytest.raises(CheckpointError, match="the file is empty"):
        import_weights(empty, hipt, out=out)
    with pytest.raises(CheckpointError, match="no such file"):
        import_weights(tmp_path / "none.ckpt", hipt, out=out)
    shutil.copy(ldm, out)
    with pytest.raises(UsageError, match="exists already"):
        import_weights(ldm, hipt, out=out)


def test_command_line(files: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, ldm, hipt, out = files
    monkeypatch.setenv("WSISEG_WEIGHTS", str(tmp_path / "weights"))
    arguments = ["import", "--ldm", str(ldm), "--hipt", str(hipt)]
    run = CliRunner().invoke(command, [*arguments, "--out", str(out)])
    assert run.exit_code == 0, run.output
    assert "left out: 1 tensors inception.*" in run.output
    assert out.exists()
    run = CliRunner().invoke(command, arguments)
    assert isinstance(run.exception, UsageError)
    run = CliRunner().invoke(command, [*arguments, "--name", "pathsegdiff-brca"])
    assert isinstance(run.exception, CheckpointError)  # the files are not of full size
    assert "where the architecture has" in str(run.exception) or "384" in str(run.exception)
    architecture = tmp_path / "arch.yaml"
    architecture.write_text("unet: {channels: [32, 64, 64, 128]}\n")
    run = CliRunner().invoke(
        command, [*arguments, "--out", str(tmp_path / "b.safetensors"), "--arch", str(architecture)]
    )
    assert isinstance(run.exception, CheckpointError)
    assert "where the architecture has" in str(run.exception)
