"""Self-distillation without labels (DINO) for the small encoder. Knows no diffusion.

Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers (ICCV 2021):
multi-crop, teacher by moving average, centring and sharpening.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from wsiseg.datasets.augment import AugmentConfig, check_scale, stain_jitter
from wsiseg.errors import ConfigError
from wsiseg.models.base import to_tensor
from wsiseg.models.extractors.vit import ViT, ViTConfig
from wsiseg.training.loop import LoopConfig


@dataclass(frozen=True)
class DinoConfig:
    """Configuration of the self-distillation."""

    global_px: int = 128
    """Side of the two global crops."""
    local_px: int = 64
    """Side of the local crops."""
    local_count: int = 4
    """Local crops an image."""
    prototypes: int = 2048
    """Outputs of the projection head."""
    teacher_temperature: float = 0.04
    """Temperature of the teacher's softmax."""
    student_temperature: float = 0.1
    """Temperature of the student's softmax."""
    momentum: float = 0.99
    """First value of the teacher's moving average; goes to 1 on a cosine."""
    centre_momentum: float = 0.9
    """Moving average of the centre."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Area share of a global crop."""
    local_scale: tuple[float, float] = (0.1, 0.4)
    """Area share of a local crop."""

    def __post_init__(self) -> None:
        if self.prototypes < 2 or self.local_count < 0:
            raise ConfigError("dino: prototypes must be at least 2, local_count not negative")
        if not min(self.teacher_temperature, self.student_temperature) > 0:
            raise ConfigError("dino: temperatures must be above 0")
        if not (0 <= self.momentum <= 1 and 0 <= self.centre_momentum <= 1):
            raise ConfigError("dino: momentum and centre_momentum must be from 0 to 1")
        for name in ("global_scale", "local_scale"):
            check_scale(getattr(self, name), f"dino.{name}")
            if getattr(self, name)[1] > 1:
                raise ConfigError(f"dino.{name}: area shares must be at most 1")


class ProjectionHead(nn.Module):
    """Three layers to a bottleneck on the sphere, then weight-normalised prototypes."""

    def __init__(self, dim: int, prototypes: int, hidden: int = 512, bottleneck: int = 128) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, prototypes) logits of (B, dim) vectors."""
        z = nnf.normalize(self.mlp(x), dim=-1)
        return z @ nnf.normalize(self.prototypes, dim=-1).T


class DinoTask:
    """Student and teacher; the teacher is what is kept."""

    def __init__(
        self, vit: ViTConfig, config: DinoConfig, augment: AugmentConfig, loop: LoopConfig
    ) -> None:
        self.config, self.augment, self.loop = config, augment, loop
        student = nn.ModuleDict(
            {"encoder": ViT(vit), "head": ProjectionHead(vit.dim, config.prototypes)}
        )
        teacher = copy.deepcopy(student).requires_grad_(False)
        self.module = nn.ModuleDict({"student": student, "teacher": teacher})
        self.module.register_buffer("centre", torch.zeros(1, config.prototypes))

    @property
    def encoder(self) -> nn.Module:
        """The teacher's encoder."""
        teacher: Any = self.module["teacher"]
        encoder: nn.Module = teacher["encoder"]
        return encoder

    def parameters(self) -> list[nn.Parameter]:
        """The student's parameters."""
        return list(self.module["student"].parameters())

    def losses(self, batch: object, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Cross-entropy of every student crop against every other global teacher crop."""
        c = self.config
        images = to_tensor(batch, device=self.parameters()[0].device)  # type: ignore[arg-type]
        views = [self._view(images, c.global_px, c.global_scale, generator) for _ in range(2)]
        local = [
            self._view(images, c.local_px, c.local_scale, generator) for _ in range(c.local_count)
        ]
        with torch.no_grad():
            logits = _run(self.module["teacher"], views)
            temperature = c.teacher_temperature
            centre: Tensor = self.module.centre  # type: ignore[assignment]
            targets = [((t - centre) / temperature).softmax(-1) for t in logits]
            batch_centre = torch.cat(logits).mean(0, keepdim=True)
            centre.lerp_(batch_centre, 1 - c.centre_momentum)
        outputs = _run(self.module["student"], views)
        outputs += _run(self.module["student"], local) if local else []
        loss, terms = images.new_zeros(()), 0
        for i, target in enumerate(targets):
            for j, output in enumerate(outputs):
                if i != j:
                    log_p = (output / c.student_temperature).log_softmax(-1)
                    loss = loss - (target * log_p).sum(-1).mean()
                    terms += 1
        mean = torch.cat(targets).mean(0)
        spread = -(mean * (mean + 1e-9).log()).sum()  # falls to 0 if all images collapse to one
        return {"loss": loss / terms, "spread": spread}

    def after_step(self, step: int) -> None:
        """Move the teacher towards the student."""
        progress = step / max(1, self.loop.steps)
        momentum = 1 - (1 - self.config.momentum) * (math.cos(math.pi * progress) + 1) / 2
        pairs = zip(
            self.module["teacher"].parameters(), self.module["student"].parameters(), strict=True
        )
        with torch.no_grad():
            for teacher, student in pairs:
                teacher.lerp_(student, 1 - momentum)

    def _view(
        self, images: Tensor, size: int, area: tuple[float, float], generator: torch.Generator
    ) -> Tensor:
        """A random resized, flipped, stain-jittered crop of every image, as one sampling grid.

        Autocast is off: in bfloat16 the grid's positions are off by up to 0.3 px.
        """
        b = len(images)
        low, high = area
        side = (low + (high - low) * torch.rand(b, generator=generator)).sqrt()
        centre = (2 * torch.rand(b, 2, generator=generator) - 1) * (1 - side)[:, None]
        flip = 1 - 2 * (torch.rand(b, 2, generator=generator) < 0.5).float()
        swap = torch.rand(b, generator=generator) < 0.5
        matrix = torch.zeros(b, 2, 3)
        matrix[:, 0, 0], matrix[:, 1, 1] = side * flip[:, 0], side * flip[:, 1]
        matrix[swap, :, :2] = matrix[swap][:, :, [1, 0]]
        matrix[:, :, 2] = centre
        matrix = matrix.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            grid = nnf.affine_grid(matrix, [b, 3, size, size], align_corners=False)
            view = nnf.grid_sample(images, grid, align_corners=False, padding_mode="reflection")
        return stain_jitter(view, self.augment, generator)


def _run(network: nn.Module, views: list[Tensor]) -> list[Tensor]:
    """Logits of views of equal size in one pass."""
    parts = dict(network.named_children())
    logits: Tensor = parts["head"](parts["encoder"](torch.cat(views))).float()
    return list(logits.chunk(len(views)))
