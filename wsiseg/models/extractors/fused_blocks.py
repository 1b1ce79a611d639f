"""The blocks of the diffusion networks with fewer passes over memory. Knows no tiles, no devices.

diffusers' blocks of the kinds that `latent.py` builds are replaced by others with the same weights
and the same result but for rounding: group norm and SiLU in one pass that also adds what stands
before them (the bias of a convolution, the time embedding), residual and biases added in one pass,
one product for queries, keys and values, channels side by side in memory throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from wsiseg.models.fused import add_bias, attention, channels_last, group_norm


def fuse(network: nn.Module) -> nn.Module:
    """Replace the blocks of a network in evaluation mode that can be, in place; gives it back."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            own: Any = child
            fused: nn.Module | None = None
            if isinstance(child, ResnetBlock2D) and _plain_resnet(own):
                fused = FusedResnet(own)
            elif isinstance(child, Transformer2DModel) and _plain_transformer(own):
                fused = FusedTransformer(own)
            elif isinstance(child, Attention) and _plain_attention(own):
                fused = FusedAttention(own)
            elif isinstance(child, Upsample2D) and _plain_upsample(own):
                fused = FusedUpsample(own.conv)
            elif name == "conv_norm_out" and isinstance(getattr(parent, "conv_act", None), nn.SiLU):
                fused = FusedNorm(own)
                setattr(parent, "conv_act", nn.Identity())  # noqa: B010
            if fused is not None:
                setattr(parent, name, fused.eval())
    return network


def fold_times(unet: nn.Module, timesteps: Sequence[int]) -> bool:
    """Compute once what the residual blocks of a fused U-Net add at each timestep.

    `read_taps` then gives the blocks the number of the timestep in place of its embedding.

    Returns:
        Whether that was done: it is not where blocks were left as they were.
    """
    net: Any = unet
    blocks = [m for m in unet.modules() if isinstance(m, FusedResnet)]
    if any(hasattr(m, "time_emb_proj") for m in unet.modules()):
        return False
    weight = net.conv_in.weight
    times = [torch.tensor([t], device=weight.device) for t in timesteps]
    with torch.no_grad():
        embeddings = [net.time_embedding(net.time_proj(t).to(weight.dtype)) for t in times]
        for block in blocks:
            block.folded = tuple(block.added(temb) for temb in embeddings)
    net.folded_times = tuple(timesteps)
    return True


class FusedNorm(nn.Module):
    """Group norm and SiLU."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) of the same shape."""
        return group_norm(x, self.norm, silu=True)


class FusedUpsample(nn.Module):
    """Twice the size, each pixel four times, then a convolution."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """(B, C, 2 H, 2 W)."""
        b, c, h, w = x.shape
        rows = channels_last(x).permute(0, 2, 3, 1)[:, :, None, :, None]
        large = rows.expand(b, h, 2, w, 2, c).reshape(b, 2 * h, 2 * w, c)
        y: Tensor = self.conv(large.permute(0, 3, 1, 2))
        return y


class FusedResnet(nn.Module):
    """A residual block; biases of its convolutions are added where the next pass reads anyway."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = source.norm1, source.norm2
        self.conv1, self.conv2 = source.conv1, source.conv2
        self.time = source.time_emb_proj
        self.shortcut = source.conv_shortcut
        self.folded: tuple[Tensor, ...] = ()

    def added(self, temb: Tensor | None) -> Tensor:
        """(1, C') what the first convolution and the time add to each channel."""
        add: Tensor = self.conv1.bias[None]
        if self.time is not None and temb is not None:
            add = add + self.time(nnf.silu(temb[:1]))
        return add

    def forward(self, x: Tensor, temb: Tensor | int | None = None, *_: Any, **__: Any) -> Tensor:
        """(B, C', H, W) of (B, C, H, W) and (B, width) time embeddings, all of one time, or the
        number of a time of `fold_times`."""
        add = self.folded[temb] if isinstance(temb, int) else self.added(temb)
        h = _convolve(group_norm(x, self.norm1, silu=True), self.conv1)
        h = _convolve(group_norm(h, self.norm2, silu=True, add=add), self.conv2)
        bias = self.conv2.bias
        if self.shortcut is not None:
            x = _convolve(channels_last(x), self.shortcut)
            bias = bias + self.shortcut.bias
        return add_bias(x, h, bias)


def _convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution without its bias."""
    return nnf.conv2d(x, conv.weight, None, padding=cast(tuple[int, int], conv.padding))


class _Heads(nn.Module):
    """One head of attention: the projections of queries, keys and values, and the one after."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        own = (source.to_q, source.to_k, source.to_v)
        self.cross = source.to_k.in_features != source.to_q.in_features or source.is_cross_attention
        self.split = [int(p.out_features) for p in own]
        if self.cross:
            self.q, self.kv = own[0], _joined(own[1:])
        else:
            self.qkv = _joined(own)
        self.out = source.to_out[0]

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, L, C) from (B, L, C) and (B, M, width); without cross-attention x is the context."""
        if self.cross:
            q, (k, v) = self.q(x), self.kv(context).split(self.split[1:], dim=-1)
        else:
            q, k, v = self.qkv(x).split(self.split, dim=-1)
        y: Tensor = self.out(attention(q, k, v))
        return y


def _joined(layers: Any) -> nn.Linear:
    """Linear layers of one input as one."""
    first = layers[0]
    width = sum(layer.out_features for layer in layers)
    with torch.device("meta"):
        one = nn.Linear(first.in_features, width, bias=first.bias is not None)
    one.weight = nn.Parameter(torch.cat([p.weight for p in layers]), requires_grad=False)
    if first.bias is not None:
        one.bias = nn.Parameter(torch.cat([p.bias for p in layers]), requires_grad=False)
    return one


class FusedAttention(nn.Module):
    """Attention among the pixels of a map, after a group norm, with a residual."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.norm, self.heads = source.group_norm, _Heads(source)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """(B, C, H, W) of the same shape."""
        rows = _rows(group_norm(x, self.norm))
        return add_bias(x, _as_map(self.heads(rows, rows), x), None)


class FusedTransformer(nn.Module):
    """Blocks of self-attention, cross-attention and a gated layer, between two projections."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.norm, self.before, self.after = source.norm, source.proj_in, source.proj_out
        self.blocks = nn.ModuleList(_FusedBlock(b) for b in source.transformer_blocks)

    def forward(
        self, x: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any
    ) -> tuple[Tensor]:
        """((B, C, H, W),) of the same shape, from a context (B, tokens, width)."""
        rows = _rows(group_norm(x, self.norm))
        rows = nnf.linear(rows, self.before.weight.flatten(1), self.before.bias)
        for block in self.blocks:
            rows = block(rows, encoder_hidden_states)
        rows = nnf.linear(rows, self.after.weight.flatten(1))
        return (add_bias(x, _as_map(rows, x), self.after.bias),)


class _FusedBlock(nn.Module):
    def __init__(self, source: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = source.norm1, source.norm2, source.norm3
        self.own, self.cross = _Heads(source.attn1), _Heads(source.attn2)
        self.layer = source.ff

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.own(y, y)
        x = x + self.cross(self.norm2(x), context)
        z: Tensor = x + self.layer(self.norm3(x))
        return z


def _rows(x: Tensor) -> Tensor:
    """(B, H W, C) of a map (B, C, H, W): a view where channels lie side by side."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _as_map(rows: Tensor, like: Tensor) -> Tensor:
    """(B, C, H, W) of rows (B, H W, C)."""
    return torch.unflatten(rows, 1, like.shape[-2:]).permute(0, 3, 1, 2)


def _plain_resnet(block: Any) -> bool:
    return bool(
        block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm == "default"
        and not block.skip_time_act
        and block.output_scale_factor == 1
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.conv1.bias is not None
        and (block.conv_shortcut is None or block.conv_shortcut.bias is not None)
    )


def _plain_attention(block: Any) -> bool:
    """Attention of the autoencoder; that of transformers lies in those."""
    return bool(
        block.group_norm is not None
        and block.heads == 1
        and block.residual_connection
        and block.rescale_output_factor == 1
        and block.spatial_norm is None
        and block.norm_q is None
        and block.norm_k is None
        and not block.is_cross_attention
    )


def _plain_transformer(block: Any) -> bool:
    return bool(
        block.is_input_continuous
        and not block.use_linear_projection
        and all(
            b.norm_type == "layer_norm"
            and b.pos_embed is None
            and not b.only_cross_attention
            and b.attn2 is not None
            and all(
                a.heads == 1
                and a.norm_q is None
                and not a.residual_connection
                and a.rescale_output_factor == 1
                for a in (b.attn1, b.attn2)
            )
            for b in block.transformer_blocks
        )
    )


def _plain_upsample(block: Any) -> bool:
    return bool(
        block.use_conv
        and block.name == "conv"
        and block.norm is None
        and block.interpolate
        and not block.use_conv_transpose
    )
