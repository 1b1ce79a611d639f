"""What must be equal on a GPU before speeds are told: kernels, fused networks, labels."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_ways import inputs, median_ms, within, without_kernels
from torch import Tensor, nn
from torch.nn import functional as nnf

from wsiseg.errors import UsageError
from wsiseg.geometry import Point
from wsiseg.inference import fast
from wsiseg.inference.fast import FastExtractor
from wsiseg.inference.predict import PredictOptions, predict_slide
from wsiseg.models import fused
from wsiseg.models.checkpoint import load_model
from wsiseg.models.extractors.fused_blocks import fuse
from wsiseg.slides.slide import open_slide

IMAGE = Path(__file__).resolve().parents[1] / "examples" / "colon.tif"
LEAST_EQUAL = 99.9
"""Percent of labels that bf16 must share with fp32."""


def unlike(found: Tensor, wanted: Tensor) -> float:
    """Relative difference in norm; of anything that is no number, infinity."""
    value = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    return value if value == value else float("inf")


def need(bench: Any, what: str, value: float, most: float) -> None:
    """Tell a difference; where it is too large the stage ends."""
    bench.say(f"{what}: differs by {value:.2e}, allowed {most:.0e}")
    if not value <= most:
        raise UsageError(f"{what}: differs by {value:.2e}")


def check_kernels(bench: Any) -> None:
    """The kernels against float64, and what attention costs in three ways."""
    with torch.inference_mode():
        for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 4e-3)):
            _norms(bench, dtype, most)
            _attention(bench, dtype, 3 * most)
        _spread(bench)
    if bench.device.type == "cuda":
        _attention_speed(bench)


def _norms(bench: Any, dtype: torch.dtype, most: float) -> None:
    big = bench.device.type == "cuda"
    shapes = [(3, 128, 256 if big else 20, 8), (2, 576, 16, 18), (2, 1920, 8, 60), (2, 60, 33, 15)]
    worst = 0.0
    for b, c, side, width in shapes:
        x = (torch.randn(b, c, side, side, device=bench.device) * 2 + 5).to(dtype)
        norm = nn.GroupNorm(c // width, c, eps=1e-6, device=bench.device)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.to(dtype)
        for add in (None, torch.randn(1, c, device=bench.device).to(dtype)):
            found = fused.group_norm(x, norm, silu=True, add=add)
            wide = x.double() if add is None else x.double() + add.double()[:, :, None, None]
            own = [t.double() for t in (norm.weight, norm.bias)]
            wanted = nnf.silu(nnf.group_norm(wide, norm.num_groups, *own, norm.eps))
            worst = max(worst, unlike(found, wanted))
    need(bench, f"group norm and SiLU, {dtype}", worst, most)
    a, b = (torch.randn(2, 70, 9, 5, device=bench.device).to(dtype) for _ in range(2))
    bias = torch.randn(70, device=bench.device).to(dtype)
    wanted = a.double() + b.double() + bias.double()[:, None, None]
    need(bench, f"sum with bias, {dtype}", unlike(fused.add_bias(a, b, bias), wanted), most)


def _attention(bench: Any, dtype: torch.dtype, most: float) -> None:
    worst = 0.0
    for length, keys, width in ((300, 300, 384), (128, 2, 576), (64, 64, 960)):
        q, k, v = (
            torch.randn(2, n, width, device=bench.device).to(dtype) for n in (length, keys, keys)
        )
        scores = q.double() @ k.double().transpose(1, 2) / width**0.5
        worst = max(worst, unlike(fused.attention(q, k, v), scores.softmax(-1) @ v.double()))
    need(bench, f"attention, {dtype}", worst, most)


def _spread(bench: Any) -> None:
    """The head's first convolution at once against place by place."""
    head: Any = bench.model.head
    values = inputs(bench.model, "head", 1, torch.float32)
    found = head.first_convolution(values)
    with without_kernels():
        wanted = copy.deepcopy(head).double().first_convolution(tuple(v.double() for v in values))
    need(bench, "first convolution of the head, float32", unlike(found, wanted), 3e-5)


def _attention_speed(bench: Any) -> None:
    for count, length, width in ((16, 4096, 512), (64, 1024, 384), (64, 256, 576)):
        q, k, v = (
            torch.randn(count, length, width, device=bench.device).bfloat16() for _ in range(3)
        )

        def torchs(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return nnf.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])

        def halved(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
            return torch.bmm(scores.softmax(-1), v)

        def own(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return fused.attention(q, k, v)

        ms = [
            median_ms(within(work), bench.device, most_s=0.3) / count
            for work in (torchs, halved, own)
        ]
        bench.say(
            f"attention {length} x {width}, ms a tile: torch {ms[0]:.4f}, products in bf16 "
            f"{ms[1]:.4f}, products with float32 scores {ms[2]:.4f}"
        )


def check_networks(bench: Any) -> None:
    """Fused networks against the plain ones, and batches against one another."""
    source: Any = bench.model.extractor
    side = source.tile_px
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, side, side, generator=generator).to(bench.device) * 2 - 1
    places = [Point(k * side, 0) for k in range(len(images))]
    half = torch.autocast(bench.device.type, dtype=torch.bfloat16)
    with torch.inference_mode():
        plain = source(images[:2], places[:2], 0)
        joined = fuse(copy.deepcopy(source))
        worst = max(map(unlike, joined(images[:2], places[:2], 0), plain))
        del joined
        need(bench, "fused in float32 against plain", worst, 1e-4)
        with half:
            auto = source(images[:2], places[:2], 0)
        fast = FastExtractor(source, torch.bfloat16)
        quick = fast(images[:2], places[:2], 0)
        error = [max(map(unlike, maps, plain)) for maps in (auto, quick)]
        bench.say(
            f"bf16 against float32, the worst map: autocast {error[0]:.2e}, fused {error[1]:.2e}",
            bf16_error={"autocast": error[0], "fused": error[1]},
        )
        need(bench, "fused bf16 against autocast's own error", error[1] / error[0], 2)
        eager = fast(images, places, 0)
        second = fast(images, places, 0)  # captures a graph on a CUDA device
        third = fast(images.flip(0), places[::-1], 0)
        few = fast(images[:3], places[:3], 0)
        need(bench, "graph against eager", max(map(unlike, second, eager)), 1e-2)
        again = max(unlike(m.flip(0), n) for m, n in zip(third, second, strict=True))
        need(bench, "order in a batch against bf16's own error", again / error[0], 1)
        filled = max(unlike(m, n[:3]) for m, n in zip(few, second, strict=True))
        need(bench, "filled batch", filled, 1e-2)


def labels(bench: Any) -> None:
    """The labels of the bundled model: bf16 against fp32, batches against one another."""
    model = load_model("glas-small", device=str(bench.device))
    runs = [("fp32", 16), ("bf16", 64), ("bf16", 8), ("bf16", 3)]
    if bench.device.type == "cpu":
        runs = runs[:2]
    found: dict[tuple[str, int], Any] = {}
    with tempfile.TemporaryDirectory() as name, open_slide(IMAGE) as slide:
        for precision, batch in runs:
            fast._MADE.clear()  # a graph of larger batches would fill these up
            options = PredictOptions(precision=precision, batch_size=batch)
            folder = Path(name) / f"{precision}-{batch}"
            canvas = predict_slide(slide, model, folder, options=options)
            canvas.restore_labels()  # as the network gave them
            found[precision, batch] = canvas.labels(canvas.grid.box)
            if batch == 16:
                bench.say(f"labels of {slide.path.name}: {canvas.record['timings']}")
    reference = found["fp32", 16]
    for (precision, batch), own in found.items():
        equal = 100 * float((own == reference).mean())
        alike = 100 * float((own == found["bf16", 64]).mean())
        bench.say(
            f"labels {precision}, batch {batch}: {equal:.4f} % as fp32, {alike:.4f} % as bf16 of 64"
        )
        bench.numbers.setdefault("labels", {})[f"{precision} {batch}"] = [equal, alike]
        if equal < LEAST_EQUAL:
            raise UsageError(f"labels {precision}: {equal:.3f} %, below {LEAST_EQUAL} %")
