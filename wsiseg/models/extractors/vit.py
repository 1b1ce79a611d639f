"""HIPT's 256 px vision transformer (ViT-S/16) over timm, at any size. Knows no diffusion.

Source: Chen et al., Scaling Vision Transformers to Gigapixel Images via Hierarchical
Self-Supervised Learning (CVPR 2022), the 256 px level, trained with DINO.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError
from wsiseg.models.compat import ensure_torchvision_imports


@dataclass(frozen=True)
class ViTConfig:
    """Configuration of the vision transformer."""

    dim: int = 384
    """Width of a token."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 6
    """Attention heads a block."""
    patch_px: int = 16
    """Side of the square that becomes a token."""
    position_px: int = 224
    """Image side that the position embedding was made for; others are interpolated."""

    def __post_init__(self) -> None:
        if min(self.dim, self.depth, self.heads, self.patch_px) < 1 or self.dim % self.heads:
            raise ConfigError(f"encoder: dim {self.dim} must be a multiple of heads {self.heads}")
        if self.position_px < 1 or self.position_px % self.patch_px:
            raise ConfigError(
                f"encoder: position_px {self.position_px} must be a multiple of patch_px"
            )


class ViT(nn.Module):
    """A timm VisionTransformer that gives the normalised CLS token of images of any size.

    The state dict is timm's `vit_small_patch16_224` without classifier (197 positions), whose
    keys and shapes are those of the authors' checkpoint.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        ensure_torchvision_imports()
        from timm.models.vision_transformer import VisionTransformer

        self.config = config
        self.net = VisionTransformer(
            img_size=config.position_px,
            patch_size=config.patch_px,
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.heads,
            num_classes=0,
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, dim) CLS tokens of (B, 3, H, W) images in [-1, 1]; H and W multiples of the patch."""
        return self.tokens(images)[:, 0]

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 1 + n, dim) all tokens after the last norm, CLS first."""
        patches = self.net.patch_embed.proj(images)
        rows, columns = patches.shape[-2:]
        x = patches.flatten(2).transpose(1, 2)
        x = torch.cat((self.net.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self._positions(rows, columns).to(x.dtype)
        for block in self.net.blocks:
            x = block(x)
        out: Tensor = self.net.norm(x)
        return out

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Position embedding (1, 1 + rows * columns, dim), resampled as DINO does.

        DINO interpolates by the scale factor (n + 0.1) / n0, not to a size; the two differ, and
        the authors' features need the former.
        """
        table: Tensor = self.net.pos_embed
        side = self.config.position_px // self.config.patch_px
        rows, columns = int(rows), int(columns)  # tensors while a network is traced
        if rows == columns == side:
            return table
        grid = torch.unflatten(table[:, 1:], 1, (side, side)).permute(0, 3, 1, 2)
        grid = nnf.interpolate(
            grid.float(),
            scale_factor=((rows + 0.1) / side, (columns + 0.1) / side),
            mode="bicubic",
            align_corners=False,
        )
        return torch.cat((table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)
