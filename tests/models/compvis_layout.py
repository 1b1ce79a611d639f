"""The originals' networks at reduced width, written from their layout, and their checkpoints.

An independent forward to compare imported weights with: a U-Net with input_blocks, middle_block
and output_blocks, an autoencoder with encoder.down.N.block.M and 1x1-convolution attention, a
vision transformer as plain functions of a state dict. Only names and shapes are the originals'.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf


class Residual(nn.Module):
    """U-Net residual block: in_layers, emb_layers, out_layers, skip_connection."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outputs),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        same = inputs == outputs
        self.skip_connection = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """One head over tokens; keys and values from a context."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.to_out(weights @ v)


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * nnf.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Gated(width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(width, width), CrossAttention(width, context)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x))
        tokens = self.transformer_blocks[0](h.flatten(2).transpose(1, 2), context)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(h.shape))


class Down(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def _run(block: nn.ModuleList, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
    for layer in block:
        if isinstance(layer, Residual):
            x = layer(x, embedding)
        elif isinstance(layer, SpatialTransformer):
            x = layer(x, context)
        else:
            x = layer(x)
    return x


class UNet(nn.Module):
    """Two blocks a level, attention on all levels but the finest, one head."""

    def __init__(self, latent: int, widths: tuple[int, ...], context: int) -> None:
        super().__init__()
        base, emb = widths[0], 4 * widths[0]
        self.time_embed = nn.Sequential(nn.Linear(base, emb), nn.SiLU(), nn.Linear(emb, emb))
        blocks: list[nn.ModuleList] = [nn.ModuleList([nn.Conv2d(latent, base, 3, padding=1)])]
        skips, now = [base], base
        for level, width in enumerate(widths):
            for _ in range(2):
                layers: list[nn.Module] = [Residual(now, width, emb)]
                if level:
                    layers.append(SpatialTransformer(width, context))
                blocks.append(nn.ModuleList(layers))
                now = width
                skips.append(now)
            if level < len(widths) - 1:
                blocks.append(nn.ModuleList([Down(now)]))
                skips.append(now)
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = nn.ModuleList(
            [Residual(now, now, emb), SpatialTransformer(now, context), Residual(now, now, emb)]
        )
        outputs: list[nn.ModuleList] = []
        for level, width in reversed(list(enumerate(widths))):
            for index in range(3):
                layers = [Residual(now + skips.pop(), width, emb)]
                now = width
                if level:
                    layers.append(SpatialTransformer(width, context))
                if level and index == 2:
                    layers.append(Up(width))
                outputs.append(nn.ModuleList(layers))
        self.output_blocks = nn.ModuleList(outputs)
        self.out = nn.Sequential(
            nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, latent, 3, padding=1)
        )

    def blocks(self, x: Tensor, timestep: int, context: Tensor) -> tuple[list[Tensor], Tensor]:
        """Outputs of the middle block and the 12 output blocks; and the prediction."""
        half = self.time_embed[0].in_features // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half) / half)
        angles = (timestep * rates).expand(len(x), -1)
        embedding = self.time_embed(torch.cat((angles.cos(), angles.sin()), dim=-1))
        kept: list[Tensor] = []
        for block in self.input_blocks:
            x = _run(block, x, embedding, context)
            kept.append(x)
        x = _run(self.middle_block, x, embedding, context)
        found = [x]
        for block in self.output_blocks:
            x = _run(block, torch.cat((x, kept.pop()), dim=1), embedding, context)
            found.append(x)
        return found, self.out(x)


class ResnetBlock(nn.Module):
    """Autoencoder residual block: norm1, conv1, norm2, conv2, nin_shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(nnf.silu(self.norm1(x)))
        h = self.conv2(nnf.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).reshape(x.shape))


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1 = ResnetBlock(width, width), AttnBlock(width)
        self.block_2 = ResnetBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Sample(nn.Module):
    """Down: pads right and bottom, then strides; up: repeats, then convolves."""

    def __init__(self, width: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, 2, 0) if down else nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            return self.conv(nnf.pad(x, (0, 1, 0, 1)))
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Level(nn.Module):
    def __init__(self, widths: list[int], sample: str) -> None:
        super().__init__()
        self.block = nn.ModuleList([ResnetBlock(a, b) for a, b in pairwise(widths)])
        if sample:
            setattr(self, sample, Sample(widths[-1], down=sample == "downsample"))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class Coder(nn.Module):
    """Encoder or decoder of the autoencoder; `up` and `down` lists are fine to coarse."""

    def __init__(self, widths: tuple[int, ...], inputs: int, outputs: int, *, encode: bool) -> None:
        super().__init__()
        last = len(widths) - 1
        start, end = (widths[0], widths[-1]) if encode else (widths[-1], widths[0])
        self.encode = encode
        self.conv_in = nn.Conv2d(inputs, start, 3, padding=1)
        self.mid = Middle(widths[-1])
        levels = []
        for i, width in enumerate(widths):
            if encode:
                before = widths[max(i - 1, 0)]
                levels.append(Level([before, width, width], "downsample" if i < last else ""))
            else:
                before = widths[min(i + 1, last)]
                levels.append(Level([before, width, width, width], "upsample" if i else ""))
        setattr(self, "down" if encode else "up", nn.ModuleList(levels))
        self.norm_out = nn.GroupNorm(32, end, eps=1e-6)
        self.conv_out = nn.Conv2d(end, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        if self.encode:
            for level in self.down:
                x = level(x)
            x = self.mid(x)
        else:
            x = self.mid(x)
            for level in reversed(self.up):
                x = level(x)
        return self.conv_out(nnf.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """VQ with `codes`, KL without."""

    def __init__(self, widths: tuple[int, ...], latent: int, codes: int) -> None:
        super().__init__()
        moments = latent if codes else 2 * latent
        self.encoder = Coder(widths, 3, moments, encode=True)
        self.decoder = Coder(widths, latent, 3, encode=False)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        if codes:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(codes, latent)


def shake(module: nn.Module, seed: int) -> nn.Module:
    """Random weights everywhere, norms included, so that no two places are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                p.copy_(noise / math.sqrt(p[0].numel()))
            else:
                p.copy_(0.1 * noise + float("norm" in name and name.endswith("weight")))
    return module.eval().requires_grad_(False)


def dino_vit(dim: int, depth: int, seed: int) -> dict[str, Tensor]:
    """State dict of a ViT with patches of 16 px and 197 positions, as DINO names it."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    state = {
        "cls_token": some(1, 1, dim),
        "pos_embed": some(1, 197, dim),
        "patch_embed.proj.weight": 0.1 * some(dim, 3, 16, 16),
        "patch_embed.proj.bias": some(dim),
        "norm.weight": 1 + some(dim),
        "norm.bias": some(dim),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "norm1.weight": (dim,),
        "norm1.bias": (dim,),
        "attn.qkv.weight": (3 * dim, dim),
        "attn.qkv.bias": (3 * dim,),
        "attn.proj.weight": (dim, dim),
        "attn.proj.bias": (dim,),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
        "mlp.fc1.weight": (4 * dim, dim),
        "mlp.fc1.bias": (4 * dim,),
        "mlp.fc2.weight": (dim, 4 * dim),
        "mlp.fc2.bias": (dim,),
    }
    for block in range(depth):
        state |= {f"blocks.{block}.{name}": some(*shape) for name, shape in shapes.items()}
    return state


def vit_cls(state: dict[str, Tensor], images: Tensor, heads: int) -> Tensor:
    """CLS vectors of images, computed from the state dict with plain functions."""
    patches = nnf.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16
    )
    rows = patches.shape[-1]
    x = torch.cat(
        (state["cls_token"].expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)), 1
    )
    grid = state["pos_embed"][:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    if rows != 14:
        grid = nnf.interpolate(grid, scale_factor=(rows + 0.1) / 14, mode="bicubic")
    x = x + torch.cat((state["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)), 1)
    dim = x.shape[-1]
    blocks = len({n.split(".")[1] for n in state if n.startswith("blocks.")})
    for i in range(blocks):
        own = {n.removeprefix(f"blocks.{i}."): t for n, t in state.items()}
        h = nnf.layer_norm(x, (dim,), own["norm1.weight"], own["norm1.bias"], 1e-6)
        qkv = nnf.linear(h, own["attn.qkv.weight"], own["attn.qkv.bias"])
        q, k, v = qkv.reshape(*h.shape[:2], 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-2, -1) / math.sqrt(dim // heads)).softmax(-1) @ v
        x = x + nnf.linear(
            mixed.transpose(1, 2).flatten(2), own["attn.proj.weight"], own["attn.proj.bias"]
        )
        h = nnf.layer_norm(x, (dim,), own["norm2.weight"], own["norm2.bias"], 1e-6)
        h = nnf.gelu(nnf.linear(h, own["mlp.fc1.weight"], own["mlp.fc1.bias"]))
        x = x + nnf.linear(h, own["mlp.fc2.weight"], own["mlp.fc2.bias"])
    return nnf.layer_norm(x, (dim,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 0]


def schedule() -> tuple[np.ndarray, np.ndarray]:
    """The originals' betas and their cumulative products, float64."""
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    return betas, np.cumprod(1 - betas)


class Originals:
    """A reduced model in the originals' layout: networks, state dicts, files.

    Attributes:
        unet, autoencoder: independent networks with random weights.
        vit: the encoder's state dict.
        state: what the LDM checkpoint's state_dict holds.
    """

    widths = (32, 64, 64, 96)
    dim, depth, heads, context = 128, 2, 2, 48

    def __init__(self, *, latent: int = 3, levels: tuple[int, ...] = (32, 32, 64), codes: int = 24):
        self.latent = latent
        self.unet = shake(UNet(latent, self.widths, self.context), 1)
        self.autoencoder = shake(Autoencoder(levels, latent, codes), 2)
        self.patch_fc = shake(nn.Linear(self.dim, self.context), 3)
        self.region_fc = shake(nn.Linear(40, self.context), 4)
        self.vit = dino_vit(self.dim, self.depth, 5)
        betas, products = schedule()
        self.state: dict[str, Tensor] = {
            "betas": torch.tensor(betas, dtype=torch.float32),
            "alphas_cumprod": torch.tensor(products, dtype=torch.float32),
            "sqrt_alphas_cumprod": torch.tensor(products**0.5, dtype=torch.float32),
            "inception.Mixed_5b.conv.weight": torch.zeros(2, 2),
        }
        for prefix, module in (
            ("model.diffusion_model.", self.unet),
            ("first_stage_model.", self.autoencoder),
            ("cond_stage_model.patch_fc.", self.patch_fc),
            ("cond_stage_model.region_fc.", self.region_fc),
        ):
            self.state |= {prefix + name: t for name, t in module.state_dict().items()}

    def condition(self, images: Tensor) -> Tensor:
        """(B, 2, context) tokens."""
        vectors = vit_cls(self.vit, images, self.heads)
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        region = self.region_fc.bias.expand(len(images), -1)
        return torch.stack((self.patch_fc(vectors), region), dim=1)

    def write_ldm(self, path: Path, **extra: Any) -> Path:
        """A Lightning-like checkpoint."""
        torch.save({"state_dict": self.state, "epoch": 3, "global_step": 100, **extra}, path)
        return path

    def write_hipt(self, path: Path) -> Path:
        """A DINO-like checkpoint: student, teacher with heads, arguments."""
        teacher = {f"module.backbone.{n}": t for n, t in self.vit.items()}
        teacher["module.head.mlp.0.weight"] = torch.zeros(3, 3)
        args = argparse.Namespace(arch="vit_small", patch_size=16)
        torch.save({"student": {}, "teacher": teacher, "epoch": 9, "args": args}, path)
        return path
