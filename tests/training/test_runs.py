"""Training runs of a tiny network: resume, early end, limits, caches, processes, bad input."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from discs import CNN, Discs, config, fit, frozen, interrupt, same
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from wsiseg.errors import (
    CheckpointError,
    ConfigError,
    ModelError,
    OutputError,
    UsageError,
)
from wsiseg.models.base import FeatureExtractor
from wsiseg.models.checkpoint import load_model
from wsiseg.training import feature_cache, loop
from wsiseg.training import train as train_module
from wsiseg.training.evaluate import Evaluation
from wsiseg.training.head_task import HeadTask
from wsiseg.training.start import starting_point
from wsiseg.training.train import TrainConfig


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loop": {"accumulate": 2}},
        {"head": {"name": "pixel_mlp", "members": 2, "widths": [8, 4], "pixels": 64}},
        {"loss": {"cross_entropy": 0.0, "focal": 1.0, "structure": 1.0}},
        {"augment": {"hed_gain": 0.1, "blur_px": 1.0, "brightness": 0.1}},
    ],
    ids=["plain", "accumulated", "ensemble", "other losses", "colours"],
)
def test_a_resumed_run_is_the_uninterrupted_one(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = fit(config(**changes), tmp_path / "whole")
    interrupt(config(**changes), tmp_path / "half", after=4)
    half = fit(config(**changes), tmp_path / "half", resume=True)
    assert same(whole, half)
    assert same(whole.with_name("last.safetensors"), half.with_name("last.safetensors"))
    assert (tmp_path / "whole" / "validation.csv").read_text() == (
        tmp_path / "half" / "validation.csv"
    ).read_text()


def test_a_run_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="there is no run to resume"):
        fit(config(loop={"steps": 1}), tmp_path / "new", resume=True)


def test_a_run_leaves_its_logs_and_pictures(tmp_path: Path) -> None:
    fit(config(), tmp_path)
    with (tmp_path / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4", "6"]
    with (tmp_path / "validation.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4", "6"]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 300
    assert len(list((tmp_path / "validation").glob("*.png"))) == 2
    assert list((tmp_path / "tensorboard").iterdir())


def test_accumulated_batches_are_one_large_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a head and losses that treat pixels one by one, 2 x 4 patches are 8 patches."""
    found: list[Tensor] = []

    def note(parameters: list[nn.Parameter], _: float) -> Tensor:
        grads = [torch.zeros(0) if p.grad is None else p.grad.flatten() for p in parameters]
        found.append(torch.cat(grads))
        return found[-1].norm()

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note)
    for batches in ({"batch_size": 8}, {"batch_size": 4, "accumulate": 2}):
        fit(without_batch_norm(loop={"steps": 1, **batches}), tmp_path / str(len(found)))
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(*found)


def test_training_ends_when_nothing_gets_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = frozen(patience=2, loop={"steps": 40})
    pixel = {"accuracy": 0.7, "dice": 0.7, "miou": 0.4}  # 0.7 is not exact in float32
    monkeypatch.setattr(HeadTask, "validate", lambda _: Evaluation(pixel, {}))
    path = fit(run, tmp_path)
    rows = (tmp_path / "validation.csv").read_text().splitlines()
    assert [r.split(",")[0] for r in rows[1:]] == ["2", "4", "6"]
    before = path.stat().st_mtime_ns
    fit(run, tmp_path, resume=True)  # complete: nothing is trained, the model is written again
    assert (tmp_path / "validation.csv").read_text().splitlines() == rows
    assert path.stat().st_mtime_ns > before


def test_kept_features_change_nothing_but_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = {"feature_cache": {"patches": 8, "limit_gb": 1.0}}
    run = frozen(**cached)
    puts: list[int] = []
    put = feature_cache.FeatureCache.put
    monkeypatch.setattr(
        feature_cache.FeatureCache, "put", lambda s, n, f: (puts.append(n), put(s, n, f))[1]
    )
    first = fit(run, tmp_path / "a")
    assert sorted(puts) == list(range(8))  # 24 patches, each of the 8 computed once
    # the same with no room for any: every patch is computed each time
    monkeypatch.setattr(feature_cache.FeatureCache, "put", lambda *_: None)
    second = fit(run, tmp_path / "b")
    assert same(first, second)
    with pytest.raises(ConfigError, match="only for a frozen extractor"):
        config(**cached)


def test_features_are_kept_with_a_large_seed(tmp_path: Path) -> None:
    cached = {"feature_cache": {"patches": 8, "limit_gb": 1.0}, "loop": {"steps": 1}}
    assert fit(frozen(seed=20261130120000, **cached), tmp_path).is_file()


def test_the_feature_cache_is_bounded(tmp_path: Path) -> None:
    one = 16 * 2 * 2  # values: 16 channels of 2 x 2 tokens
    cache = feature_cache.FeatureCache(tmp_path, limit_bytes=7 * one, processes=1)
    for number in range(8):
        cache.put(number, (torch.full((1, 1, 16, 2, 2), number + 0.5),))
    kept = [n for n in range(8) if cache.get(n) is not None]
    assert kept == [0, 1, 2]
    assert float(cache.get(2)[0].mean()) == 2.5  # type: ignore[index]
    (tmp_path / "1.safetensors").write_bytes(b"damaged")
    assert cache.get(1) is None


def test_processes_share_the_limit_of_the_feature_cache(tmp_path: Path) -> None:
    maps = (torch.zeros(1, 1, 16, 2, 2),)  # 128 bytes
    for kept in (2, 4):  # the second time what is there counts for both
        held = sum(p.stat().st_size for p in tmp_path.iterdir())
        limit = {"limit_bytes": held + 3 * 128, "processes": 2}
        caches = [feature_cache.FeatureCache(tmp_path, **limit) for _ in range(2)]
        for number in range(kept, kept + 8):
            caches[number % 2].put(number, maps)
        assert len(list(tmp_path.iterdir())) == kept


def test_the_feature_cache_leaves_the_last_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = feature_cache.FeatureCache(tmp_path / "features", limit_bytes=10**9, processes=1)
    maps = (torch.zeros(1, 1, 16, 2, 2),)  # 128 bytes
    for number, room in enumerate((128, 127)):
        usage = SimpleNamespace(free=feature_cache.SPARE_BYTES + room)
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
            cache.put(number, maps)
    assert [cache.get(n) is not None for n in (0, 1)] == [True, False]
    shutil.rmtree(cache.folder)  # by somebody, to have room again
    cache.put(2, maps)
    assert cache.get(2) is None


def test_a_resumed_run_with_another_limit_takes_the_kept_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(limit_gb: float, save_every: int = 2) -> TrainConfig:
        cache = {"patches": 8, "limit_gb": limit_gb}
        return frozen(feature_cache=cache, loop={"save_every": save_every})

    def write(*arguments: Any) -> None:
        assert not (tmp_path / "half" / "features").exists()  # gives the models their room
        write_models(*arguments)

    whole = fit(run(1.0), tmp_path / "whole")
    interrupt(run(1.0), tmp_path / "half", after=4)
    write_models = train_module.write_models
    monkeypatch.setattr(train_module, "write_models", write)
    monkeypatch.setattr(feature_cache.FeatureCache, "put", None)
    assert same(whole, fit(run(1e-6, save_every=3), tmp_path / "half", resume=True))


def test_a_frozen_network_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its weights are random and would stay so"):
        starting_point(frozen(), None, device="cpu")
    with pytest.raises(UsageError, match="--with-head: give the model"):
        starting_point(config(), None, with_head=True, device="cpu")
    with pytest.raises(CheckpointError, match=r"pathsegdiff-brca.* such as glas-small") as raised:
        starting_point(config(extractor={}), None, device="cpu")
    assert raised.value.exit_code == 2  # as for another name that is not there
    start = starting_point(config(), None, device="cpu")
    assert start.origin == {"initial": "random"}
    assert isinstance(start.model, FeatureExtractor)
    path = fit(config(loop={"steps": 1}), tmp_path)
    with pytest.raises(ConfigError, match="holds the extractor cnn, not hipt"):
        starting_point(frozen(), str(path), device="cpu")
    other = config(extractor={**CNN, "channels": [4, 4, 8, 16]})
    with pytest.raises(ConfigError, match=r"extractor\.channels: cannot be changed"):
        starting_point(other, str(path), device="cpu")


def test_the_resolution_is_that_of_the_extractor(tmp_path: Path) -> None:
    assert starting_point(config(mpp=None), None, device="cpu").config.mpp == 0.5
    path = str(fit(config(mpp=2.0, loop={"steps": 1}), tmp_path))
    assert starting_point(config(mpp=None), path, device="cpu").config.mpp == 2.0
    with pytest.warns(UserWarning, match="mpp 1: the extractor was made for 2 um per pixel"):
        assert starting_point(config(mpp=1.0), path, device="cpu").config.mpp == 1.0
    with pytest.raises(ConfigError, match="mpp: give the micrometres"):
        fit(config(mpp=None), tmp_path / "b")


def test_a_full_disk_leaves_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(config(), tmp_path, after=2)
    good = (tmp_path / "state.pt").read_bytes()

    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 1 vs 0")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OutputError):
            fit(config(), tmp_path, resume=True)
    assert (tmp_path / "state.pt").read_bytes() == good
    assert not list(tmp_path.glob("*.part*"))
    fit(config(), tmp_path, resume=True)


def test_resize_and_stain_are_in_the_checkpoint(tmp_path: Path) -> None:
    path = fit(config(resize_px=64, normalise="macenko", loop={"steps": 1}), tmp_path)
    info = load_model(path, device="cpu").info
    assert info.resize_px == 64
    assert info.stain_target is not None


def test_a_head_whose_images_were_prepared_otherwise_is_told_of(tmp_path: Path) -> None:
    prepared = config(resize_px=64, normalise="macenko", loop={"steps": 1})
    first = fit(prepared, tmp_path / "a")

    def go_on(run: TrainConfig, out: str) -> None:
        train_module.train(run, Discs(), load_model(first, device="cpu"), out=tmp_path / out)

    told = "a was trained on images of normalise=macenko resize_px=64, this run has normalise=none"
    with pytest.warns(UserWarning, match=told):
        go_on(config(loop={"steps": 1}), "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go_on(prepared, "c")


class Cut(Discs):
    """The same, cut from one file."""

    @property
    def files(self) -> tuple[int, ...]:
        return (0,) * len(self)


def test_stains_of_patches_by_themselves_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="patches go by their own stains here"):
        fit(config(normalise="macenko", loop={"steps": 1}), tmp_path, data=Cut())


def test_a_gradient_that_is_not_finite_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(config(), tmp_path, after=2)
    good = (tmp_path / "state.pt").read_bytes()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(ModelError, match="the gradient is not finite at step 3"):
        fit(config(), tmp_path, resume=True)
    assert (tmp_path / "state.pt").read_bytes() == good


def test_features_of_another_configuration_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {"feature_cache": {"patches": 8}, "loop": {"log_every": 6, "save_every": 6}}
    clean = fit(frozen(**cache, mpp=2.0), tmp_path / "clean")
    with monkeypatch.context() as patched:  # stopped before the first line of its log
        patched.setattr(loop, "_check_finite", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(frozen(**cache), tmp_path / "out")
    assert list((tmp_path / "out" / "features").rglob("*.safetensors"))
    assert same(clean, fit(frozen(**cache, mpp=2.0), tmp_path / "out"))
    assert not (tmp_path / "out" / "features").exists()


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from discs import fit
from test_runs import without_batch_norm
from wsiseg.training.processes import Processes
fit(without_batch_norm(), Path({out!r}))
sys.stdout.write("process %d of %d\\n" % (Processes().index, Processes().count))
Processes().end()
"""


def without_batch_norm(**changes: Any) -> TrainConfig:
    """A run in which half a batch and half a batch are the batch."""
    return config(
        extractor={"name": "stain", "tile_px": 32},
        head={"name": "linear"},
        trainable="none",
        augment={"stain_gain": 0.0, "stain_shift": 0.0},
        **changes,
    )


def test_two_processes_train_the_model_that_one_does(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent), out=str(tmp_path / "two")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"process 0 of 2", "process 1 of 2"} <= set(done.stdout.splitlines())
    one = load_file(fit(without_batch_norm(), tmp_path / "one").with_name("last.safetensors"))
    two = load_file(tmp_path / "two" / "last.safetensors")
    for name, value in one.items():
        assert torch.allclose(value.float(), two[name].float(), atol=2e-3), name
    assert float(one["head.classifier.weight"].abs().max()) > 0.01
    with (tmp_path / "two" / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4", "6"]
