"""Checkpoints: what is written comes back, and what is not one ends in one clear line."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import CLASSES, EXTRACTORS, tiny_extractor, tiny_model

from wsiseg.errors import CheckpointError, ConfigError, OutputError, UsageError
from wsiseg.geometry import Point
from wsiseg.models import storage, zoo
from wsiseg.models.checkpoint import (
    load_extractor,
    load_model,
    pick_device,
    read_card,
    save_checkpoint,
    save_extractor,
)
from wsiseg.models.segmenter import Segmenter

PLACES = [Point(96, 0)]
CARD = {"data": "synthetic", "metrics": {"accuracy": 0.5}}


def window() -> torch.Tensor:
    return torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.fixture(scope="module")
def model() -> Segmenter:
    return tiny_model()


@pytest.fixture(scope="module")
def written(tmp_path_factory: Any, model: Segmenter) -> dict[str, bytes]:
    """Checkpoints as bytes: of the tiny PathSegDiff, and of a model with next to no extractor."""
    file = tmp_path_factory.mktemp("written") / "m.safetensors"
    found = {}
    for key, segmenter in (("pathsegdiff", model), ("stain", tiny_model("stain", "fcn"))):
        save_checkpoint(file, segmenter, card=CARD, licence="CC0-1.0")
        found[key] = file.read_bytes()
    return found


@pytest.fixture
def path(tmp_path: Path, written: dict[str, bytes]) -> Path:
    file = tmp_path / "glands.safetensors"
    file.write_bytes(written["pathsegdiff"])
    return file


@pytest.fixture
def small(tmp_path: Path, written: dict[str, bytes]) -> Path:
    file = tmp_path / "small.safetensors"
    file.write_bytes(written["stain"])
    return file


@pytest.mark.parametrize("extractor", EXTRACTORS)
@torch.inference_mode()
def test_every_model_comes_back(tmp_path: Path, extractor: str) -> None:
    before = tiny_model(extractor, "fcn", seed=3)
    file = tmp_path / "m.safetensors"
    save_checkpoint(file, before, card=CARD, licence="CC0-1.0")
    after = load_model(file, device="cpu")
    assert torch.equal(
        before.probabilities(window(), PLACES), after.probabilities(window(), PLACES)
    )
    assert not after.training
    assert not any(p.requires_grad for p in after.parameters())
    assert after.info.config == before.info.config
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_prediction_needs_is_in_the_file(path: Path, model: Segmenter) -> None:
    info = load_model(path, device="cpu").info
    assert (info.name, info.mpp, info.window_px, info.tile_px) == ("glands", 0.5, 96, 32)
    assert info.classes.to_list() == model.info.classes.to_list()
    assert (info.licence, info.card) == ("CC0-1.0", CARD)
    assert info.sha256 == storage.sha256_of(path)
    metadata = read_card(path)
    assert metadata["kind"] == "segmenter"
    assert metadata["versions"]["torch"] == torch.__version__
    assert metadata["config"]["classes"][0]["background"] is True


def test_what_only_training_needs_is_left_out(path: Path, model: Segmenter, tmp_path: Path) -> None:
    names = set(load_file(path))
    assert not any("decoder" in n or "post_quant" in n or "quantize" in n for n in names)
    assert any("first_stage.encoder" in n for n in names)
    assert hasattr(model.extractor.first_stage, "decoder")  # the model in memory is left alone
    whole = tmp_path / "e.safetensors"
    save_extractor(whole, model.extractor, card={}, licence="CC0-1.0")
    assert any("decoder" in n for n in load_file(whole))


@torch.inference_mode()
def test_float16_is_half_the_size_and_close(path: Path, model: Segmenter) -> None:
    half = path.with_name("half.safetensors")
    save_checkpoint(half, model, card=CARD, licence="CC0-1.0", dtype="float16")
    assert half.stat().st_size < 0.62 * path.stat().st_size
    after = load_model(half, device="cpu")
    assert all(p.dtype == torch.float32 for p in after.parameters())
    difference = after.probabilities(window(), PLACES) - model.probabilities(window(), PLACES)
    assert 0 < float(difference.abs().max()) < 0.01
    stored = load_file(half)
    assert stored["head.norm.running_var"].dtype == torch.float32
    assert stored["head.conv.weight"].dtype == torch.float16
    again = path.with_name("again.safetensors")
    save_checkpoint(again, after, card=CARD, licence="CC0-1.0")
    prints = [read_card(f)["extractor_fingerprint"] for f in (path, half, again)]
    assert prints[1] == prints[2] != prints[0]  # of the values, not of how they are stored


def test_tied_tensors_are_stored_each_by_itself(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tensors = {"a": shared, "b": shared, "c": shared[2:], "d": shared.view(2, 3).T}
    file = tmp_path / "t.safetensors"
    storage.write(file, tensors, {"kind": "extractor"})
    for name, tensor in storage.read_tensors(file).items():
        assert torch.equal(tensor, tensors[name])


def test_extractor_alone(tmp_path: Path) -> None:
    before = tiny_extractor("pathsegdiff, KL", seed=5)
    file = tmp_path / "kl.safetensors"
    save_extractor(file, before, card={}, licence="CC0-1.0")
    after: Any = load_extractor(file, device="cpu", options={"taps": [4, 6], "timesteps": [9]})
    assert after.config.taps == (4, 6)
    assert len(after.specs) == 2
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name])
    with pytest.raises(ConfigError, match=r"extractor\.tile_px: cannot be changed"):
        load_extractor(file, device="cpu", options={"tile_px": 64})
    with pytest.raises(ConfigError, match="taps"):
        load_extractor(file, device="cpu", options={"taps": [20]})
    with pytest.raises(CheckpointError, match="an extractor without a head"):
        load_model(file, device="cpu")


@torch.inference_mode()
def test_extractor_of_a_whole_model(path: Path, model: Segmenter) -> None:
    extractor = load_extractor(path, device="cpu")
    tile = window()[..., :32, :32]
    ours, theirs = extractor(tile, PLACES, 1), model.extractor(tile, PLACES, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_names() -> None:
    stain = load_model("stain-threshold", device="cpu")
    assert (stain.info.mpp, stain.info.window_px, stain.info.tile_px) == (0.5, 768, 256)
    assert [c.background for c in stain.info.classes] == [True, False]
    assert len(stain.info.sha256) == 64
    with pytest.raises(
        UsageError, match="'unet' is not known; use glas-small, glas-lite, luad-small, st"
    ):
        load_model("unet")


def test_names_whose_weights_are_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSISEG_WEIGHTS", str(tmp_path))
    for name in ("pathsegdiff-brca", "pathsegdiff-brca-null"):
        with pytest.raises(CheckpointError, match=r"pathsegdiff-brca\.safetensors; 'wsiseg models"):
            load_model(name)
    monkeypatch.setattr(zoo, "BUNDLED", tmp_path)
    with pytest.raises(CheckpointError, match="glas-small: its file is not in this installation"):
        load_model("glas-small")


def test_a_name_that_shares_a_file_changes_only_the_conditioning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Segmenter
) -> None:
    monkeypatch.setenv("WSISEG_WEIGHTS", str(tmp_path))
    file = tmp_path / "pathsegdiff-brca.safetensors"
    save_extractor(file, tiny_extractor(), card={}, licence="CC0-1.0")
    null: Any = load_extractor("pathsegdiff-brca-null", device="cpu")
    full: Any = load_extractor("pathsegdiff-brca", device="cpu")
    assert (null.config.conditioning, full.config.conditioning) == ("null", "encoder")
    save_checkpoint(file, model, card={}, licence="CC0-1.0")
    assert load_model("pathsegdiff-brca", device="cpu").info.name == "pathsegdiff-brca"
    with pytest.raises(CheckpointError, match="conditioning is not null"):
        load_model("pathsegdiff-brca-null", device="cpu")


# --- files that are not what was expected ---


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Change metadata and tensors of a checkpoint behind its back."""
    with safe_open(str(path), framework="pt") as file:
        metadata = json.loads(file.metadata()[storage.KEY])
    tensors = load_file(path)
    change(metadata, tensors)
    save_file(tensors, str(path), metadata={storage.KEY: json.dumps(metadata)})


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path, device="cpu")
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert not text.endswith(".")


def test_missing_and_empty(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "there is no such file")
    (tmp_path / "empty.safetensors").touch()
    refused(tmp_path / "empty.safetensors", "the file is empty")
    refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("keep", [4, 20, 2000, -1])
def test_truncated(small: Path, keep: int) -> None:
    small.write_bytes(small.read_bytes()[:keep])
    refused(small, "not a safetensors file|truncated inside its header|bytes where its header says")


def test_longer_than_its_header_says(small: Path) -> None:
    small.write_bytes(small.read_bytes() + b"x")
    refused(small, "bytes where its header says")


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_refused_and_not_opened(tmp_path: Path, protocol: int) -> None:
    file, mark = tmp_path / "m.safetensors", tmp_path / "ran"
    file.write_bytes(pickle.dumps(Trap(mark), protocol=protocol))
    refused(file, "a pickle file, which can run code .* 'wsiseg models import'")
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_header_whose_length_begins_like_a_pickle(small: Path, protocol: int) -> None:
    data = small.read_bytes()
    length = int.from_bytes(data[:8], "little")
    wanted = (length | 0xFFFF) + 1 + protocol * 256 + 0x80  # bytes 80 and the protocol
    header = data[8 : 8 + length].ljust(wanted)
    small.write_bytes(wanted.to_bytes(8, "little") + header + data[8 + length :])
    assert small.read_bytes()[:2] == bytes([0x80, protocol])
    assert load_model(small, device="cpu").info.name == small.stem


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_refused(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=zipped)
    refused(file, "wsiseg models import")


def test_other_files(tmp_path: Path) -> None:
    file = tmp_path / "page.safetensors"
    file.write_text("<!DOCTYPE html><html>not found</html>")
    refused(file, "not a safetensors file; give a wsiseg checkpoint")
    save_file({"a": torch.ones(2)}, str(file))
    refused(file, "a safetensors file, but not one of wsiseg")
    file.write_bytes(struct.pack("<Q", 9) + b'{"a": 3} ')
    refused(file, "damaged header")


def metadata_set(**values: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda metadata, _: metadata.update(values)


def config_set(**values: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda metadata, _: metadata["config"].update(values)


THREE = [*CLASSES, {"name": "Nerve", "color": [0, 0, 9]}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (metadata_set(format=99), "checkpoint format 99, this wsiseg reads up to 1; update wsiseg"),
        (metadata_set(format="1"), "without a format version"),
        (metadata_set(kind="tokenizer"), "holds 'tokenizer', not one of segmenter, extractor"),
        (metadata_set(config=3), "without config, licence or card"),
        (metadata_set(card=None), "without config, licence or card"),
        (metadata_set(extractor_fingerprint="0"), "the extractor is not the one"),
        (config_set(mpp=-1.0), r"mpp -1\.0: must be from"),
        (config_set(mpp=1e9), r"mpp 1000000000\.0: must be from"),
        (config_set(mpp="half"), "mpp: must be float"),
        (config_set(window_px=100), "window_px 100: must be a multiple of the tile"),
        (config_set(classes=THREE), r"tensor head\.classifier\.weight is \[2, 8, 3, 3\] where"),
        (config_set(classes=[]), "0 classes"),
        (config_set(classes=[CLASSES[0], CLASSES[0]]), "class names must differ"),
        (config_set(head={"name": "threshold"}), r"tensor head.* does not belong"),
        (config_set(head={"name": "threshold"}, classes=THREE), "head threshold: needs"),
        (config_set(future=1), "unknown key future"),
        (lambda m, t: t.pop("head.norm.bias"), r"tensor head\.norm\.bias is missing"),
        (lambda m, t: t.update(extra=torch.ones(1)), "tensor extra does not belong"),
        (lambda m, t: t["extractor.unmix"].add_(1), "the extractor is not the one"),
    ],
)
def test_contents_that_cannot_be(small: Path, change: Any, message: str) -> None:
    rewrite(small, change)
    refused(small, message)


def test_absurd_metadata(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({}, str(path), metadata={storage.KEY: "[" * (storage.MAX_METADATA + 1)})
    refused(path, "characters of metadata, which cannot be")
    save_file({}, str(path), metadata={storage.KEY: "[" * 100_000})
    refused(path, "damaged metadata")
    save_file({}, str(path), metadata={storage.KEY: "{"})
    refused(path, "damaged metadata")


# --- writing ---


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.head.conv.bias[0] = float("nan")
    file = tmp_path / "m.safetensors"
    with pytest.raises(CheckpointError, match=r"head\.conv\.bias: values are not finite"):
        save_checkpoint(file, broken, card={}, licence="CC0-1.0")
    with torch.no_grad():
        broken.head.conv.bias[0] = 0.0
        broken.head.conv.weight[0] = 1e6
    with pytest.raises(CheckpointError, match=r"not finite as torch\.float16"):
        save_checkpoint(file, broken, card={}, licence="CC0-1.0", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path, model: Segmenter) -> None:
    with pytest.raises(UsageError, match=r"must end in \.safetensors"):
        save_checkpoint(tmp_path / "m.pt", model, card={}, licence="CC0-1.0")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "m.safetensors", model, card={}, licence="CC0-1.0")


def test_a_failed_write_leaves_the_old_file(
    path: Path, model: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save_checkpoint(path, model, card={}, licence="CC0-1.0")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in {"cpu", "cuda", "mps"}
    with pytest.raises(UsageError, match="device 'gpu': use auto, cpu, cuda"):
        pick_device("gpu")
    with pytest.raises(UsageError, match="not there; use --device auto or cpu"):
        pick_device("cuda:99")
