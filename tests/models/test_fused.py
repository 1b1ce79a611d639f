"""Fused operations and blocks give what the plain ones do, on the CPU and by Triton's interpreter.

On a GPU benchmarks/gpu.py makes the same comparisons before it measures.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_extractor
from torch import nn
from torch.nn import functional as nnf

from wsiseg.geometry import Point
from wsiseg.models import fused
from wsiseg.models.extractors.fused_blocks import fold_times, fuse

PLACES = [Point(0, 0), Point(32, 0), Point(32, 64)]
MODELS = [
    "pathsegdiff",
    "pathsegdiff, KL",
    "pathsegdiff, steps and taps",
    "pathsegdiff, details",
    "pathsegdiff, one token",
]


@pytest.mark.parametrize("name", MODELS)
def test_fused_networks_give_the_same(name: str) -> None:
    source: Any = tiny_extractor(name)
    joined = fuse(copy.deepcopy(source))
    plain = {"ResnetBlock2D", "Transformer2DModel", "Upsample2D", "Attention"}
    kinds = {
        type(m).__name__
        for part in (joined.unet, joined.first_stage.encoder)
        for m in part.modules()
    }
    assert not plain & kinds
    assert {"FusedResnet", "FusedTransformer", "FusedUpsample", "FusedNorm"} <= kinds
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        for a, b in zip(joined(images, PLACES, 4), source(images, PLACES, 4), strict=True):
            assert a.shape == b.shape
            assert float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


@pytest.mark.parametrize("name", ["pathsegdiff", "pathsegdiff, steps and taps"])
def test_folded_times_change_nothing(name: str) -> None:
    """But for the rounding of a product with one row; the embedding is not computed any more."""
    joined: Any = fuse(tiny_extractor(name))
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        before = joined(images, PLACES, 4)
        assert fold_times(joined.unet, joined.config.timesteps)
        steps = len(joined.config.timesteps)
        assert (steps == 1) == (name == "pathsegdiff")
        blocks = [m for m in joined.unet.modules() if hasattr(m, "folded")]
        assert {len(b.folded) for b in blocks} == {steps}
        del joined.unet.time_embedding
        after = joined(images, PLACES, 4)
    for a, b in zip(after, before, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def test_blocks_of_other_kinds_are_left() -> None:
    source: Any = tiny_extractor()
    block = source.unet.down_blocks[0].resnets[0]
    block.output_scale_factor = 2.0
    source.unet.down_blocks[1].attentions[0].use_linear_projection = True
    source.unet.up_blocks[0].upsamplers[0].use_conv_transpose = True
    source.first_stage.encoder.mid_block.attentions[0].rescale_output_factor = 2.0
    joined: Any = fuse(source)
    assert joined.unet.down_blocks[0].resnets[0] is block
    assert not fold_times(joined.unet, [50]), "a block that wants the embedding"
    left = {type(m).__name__ for m in joined.modules()}
    assert {"ResnetBlock2D", "Transformer2DModel", "Upsample2D", "Attention"} <= left


def test_operations_against_float64() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 24, 7, 9) * 2 + 5
    norm = nn.GroupNorm(8, 24, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    add = torch.randn(1, 24)
    with torch.no_grad():
        wide = copy.deepcopy(norm).double()(x.double() + add.double()[:, :, None, None])
        found = fused.group_norm(x, norm, silu=True, add=add)
        assert float((found - nnf.silu(wide)).abs().max()) < 1e-5
        plain = copy.deepcopy(norm).double()(x.double())
        assert float((fused.group_norm(x, norm) - plain).abs().max()) < 1e-5
    half = fused.add_bias(x.bfloat16(), x.bfloat16(), torch.ones(24))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, (2 * x.bfloat16().float() + 1).bfloat16()), "rounded once"
    q, k = torch.randn(2, 5, 300), torch.randn(2, 7, 300)
    scores = (q @ k.transpose(1, 2) / 300**0.5).softmax(-1)
    assert float((fused.attention(q, k, k) - scores @ k).abs().max()) < 1e-5


def test_there_are_no_kernels_on_a_cpu() -> None:
    with torch.no_grad():
        assert fused.kernels(torch.zeros(1)) is None


@pytest.mark.parametrize(
    "error", [None, RuntimeError("Failed to find C compiler.\nSet CC"), PermissionError("denied")]
)
def test_where_triton_cannot_compile_torch_goes_on(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def add_bias(*args: Any) -> None:
        if error is not None:
            raise error

    own, x = SimpleNamespace(add_bias=add_bias), torch.zeros(1)
    on_gpu: Any = SimpleNamespace(is_cuda=True, device=x.device)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.import_module", lambda name: own)
    fused._there.cache_clear()
    try:
        with torch.no_grad(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = [fused.kernels(on_gpu) for _ in range(3)]
    finally:
        fused._there.cache_clear()
    assert found == [own if error is None else None] * 3
    texts = [str(w.message) for w in said]
    reason = str(error).partition("\n")[0]
    assert [t.partition("; going on")[0] for t in texts] == (
        [] if error is None else [f"cpu: Triton cannot compile ({reason})"]
    )


INTERPRETED = """
import torch
from torch import nn
from torch.nn import functional as nnf
from wsiseg.models import kernels

torch.manual_seed(0)

def last(*shape):
    return torch.randn(*shape).to(memory_format=torch.channels_last)

def close(found, wanted, most=1e-5):
    worst = float((found.double() - wanted).abs().max())
    assert worst <= most, worst

with torch.no_grad():
    shapes = ((2, 24, 8, 7, 5, 0), (2, 70, 7, 20, 15, 1), (2, 12, 3, 8, 8, 2))
    for b, c, groups, h, w, rows in shapes:
        x, norm = last(b, c, h, w) + 3, nn.GroupNorm(groups, c, eps=1e-6)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        add = torch.randn(rows, c) if rows else None
        wide = x.double() if add is None else x.double() + add.double()[:, :, None, None]
        wanted = nnf.silu(nn.GroupNorm.forward(norm.double(), wide))
        close(kernels.group_norm(x, norm.float(), silu=True, add=add), wanted)
    a, b, bias = last(2, 70, 3, 5), last(2, 70, 3, 5), torch.randn(70)
    close(kernels.add_bias(a, b, bias), a.double() + b + bias[:, None, None])
    close(kernels.add_bias(a, b, None), a.double() + b)
    scores = torch.randn(3, 2, 70)
    close(kernels.softmax(scores, 0.3, torch.float32), (scores.double() * 0.3).softmax(-1))
    r, k, side, c = 2, 3, 4, 5
    for s in (1, 2, 4, 8):
        maps, out = torch.randn(r * k, s, s, 9 * c), last(1, c, r * side, k * side)
        wanted = out.double()
        for i in range(9):
            part = maps[..., i * c : (i + 1) * c].permute(0, 3, 1, 2).double()
            part = nnf.interpolate(part, size=(side, side), mode="bilinear", align_corners=False)
            laid = part.unflatten(0, (1, r, k)).permute(0, 3, 1, 4, 2, 5)
            padded = nnf.pad(laid.reshape(1, c, r * side, k * side), (1, 1, 1, 1))
            wanted += padded[..., i // 3 : i // 3 + r * side, i % 3 : i % 3 + k * side]
        kernels.spread(maps, out, tile_rows=r, tile_columns=k)
        close(out, wanted)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_by_the_interpreter() -> None:
    subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
