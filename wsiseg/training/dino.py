"""Self-distillation without labels (DINO, with masked patches iBOT). Knows no diffusion.

Sources: Caron et al., Emerging Properties in Self-Supervised Vision Transformers (ICCV 2021):
multi-crop, teacher by moving average, centring and sharpening; Zhou et al., iBOT (ICLR 2022):
the patch tokens that the student does not see are predicted to be the teacher's.
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
from wsiseg.training.processes import Processes


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
    hidden: int = 512
    """Width of its two hidden layers; 2048 in DINO."""
    bottleneck: int = 128
    """Width of what its last layer sees; 256 in DINO."""
    freeze_steps: int = 0
    """Steps at the beginning in which the last layer stays as it is; an epoch in DINO."""
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
    mask_share: float = 0.0
    """Share of the patch tokens that is hidden from the student in every second global crop and
    predicted, as in iBOT; 0 = off, which is DINO."""
    mask_weight: float = 1.0
    """Weight of that loss."""

    def __post_init__(self) -> None:
        if self.prototypes < 2 or self.local_count < 0:
            raise ConfigError("dino: prototypes must be at least 2, local_count not negative")
        if min(self.hidden, self.bottleneck) < 1 or self.freeze_steps < 0:
            raise ConfigError("dino: hidden and bottleneck must be at least 1, freeze_steps from 0")
        if not min(self.teacher_temperature, self.student_temperature) > 0:
            raise ConfigError("dino: temperatures must be above 0")
        if not (0 <= self.momentum <= 1 and 0 <= self.centre_momentum <= 1):
            raise ConfigError("dino: momentum and centre_momentum must be from 0 to 1")
        for name in ("global_scale", "local_scale"):
            check_scale(getattr(self, name), f"dino.{name}")
            if getattr(self, name)[1] > 1:
                raise ConfigError(f"dino.{name}: area shares must be at most 1")
        if not 0 <= self.mask_share < 1 or self.mask_weight < 0:
            raise ConfigError("dino: mask_share must be from 0 to below 1, mask_weight from 0")


class ProjectionHead(nn.Module):
    """Three layers to a bottleneck on the sphere, then weight-normalised prototypes."""

    def __init__(self, dim: int, config: DinoConfig) -> None:
        super().__init__()
        hidden, bottleneck = config.hidden, config.bottleneck
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, bottleneck) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(..., prototypes) logits of (..., dim) vectors."""
        z = nnf.normalize(self.mlp(x), dim=-1)
        return z @ nnf.normalize(self.prototypes, dim=-1).T


class DinoTask:
    """Student and teacher; the teacher is what is kept.

    The centres are those of the teacher's logits over all processes.
    """

    def __init__(
        self, vit: ViTConfig, config: DinoConfig, augment: AugmentConfig, loop: LoopConfig
    ) -> None:
        self.config, self.augment, self.loop = config, augment, loop
        self.vit, self.processes = vit, Processes()
        student = nn.ModuleDict({"encoder": ViT(vit), "head": ProjectionHead(vit.dim, config)})
        if config.mask_share:
            student["patch_head"] = ProjectionHead(vit.dim, config)
            student["mask"] = nn.ParameterList([torch.zeros(vit.dim)])
        teacher = copy.deepcopy(student).requires_grad_(False)
        self.module = nn.ModuleDict({"student": student, "teacher": teacher})
        self.centres = ["centre", "patch_centre"] if config.mask_share else ["centre"]
        for name in self.centres:
            self.module.register_buffer(name, torch.zeros(1, config.prototypes))
        self._seen: dict[str, list[Tensor]] = {name: [] for name in self.centres}

    @property
    def encoder(self) -> ViT:
        """The teacher's encoder."""
        teacher: Any = self.module["teacher"]
        encoder: ViT = teacher["encoder"]
        return encoder

    def parameters(self) -> list[nn.Parameter]:
        """The student's parameters."""
        return list(self.module["student"].parameters())

    def losses(self, batch: object, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Cross-entropy of every student crop against every other global teacher crop.

        With `mask_share` also that of every hidden patch of a global crop against the teacher's.
        `spread` tells a collapse, see `_spread`.
        """
        c = self.config
        self._freeze(step < c.freeze_steps)
        images = to_tensor(batch, device=self.parameters()[0].device)  # type: ignore[arg-type]
        views = [self._view(images, c.global_px, c.global_scale, generator) for _ in range(2)]
        local = [
            self._view(images, c.local_px, c.local_scale, generator) for _ in range(c.local_count)
        ]
        hidden = self._hidden(len(images), generator).to(images.device) if c.mask_share else None
        student: Any = self.module["student"]
        teacher: Any = self.module["teacher"]
        with torch.no_grad():
            known = teacher["encoder"].tokens(torch.cat(views))
            targets = self._targets(teacher["head"](known[:, 0]), "centre").chunk(2)
        seen = _tokens(student, torch.cat(views), hidden)
        outputs = list(student["head"](seen[:, 0]).float().chunk(2))
        if local:
            vectors = student["encoder"](torch.cat(local))
            outputs += student["head"](vectors).float().chunk(len(local))
        pairs = [(t, o) for i, t in enumerate(targets) for j, o in enumerate(outputs) if i != j]
        loss = torch.stack([self._cross_entropy(*pair) for pair in pairs]).mean()
        spread = _spread(torch.cat(targets))
        if hidden is None:
            return {"loss": loss, "spread": spread}
        with torch.no_grad():
            wanted = self._targets(teacher["patch_head"](known[:, 1:][hidden]), "patch_centre")
        masked = self._cross_entropy(wanted, student["patch_head"](seen[:, 1:][hidden]).float())
        return {"loss": loss + c.mask_weight * masked, "spread": spread, "masked": masked}

    def _freeze(self, frozen: bool) -> None:
        """Have the last layers of the student's heads learn or not, as DINO's code does."""
        for name, module in self.module["student"].named_children():
            if name.endswith("head"):
                prototypes: Any = module.prototypes
                prototypes.requires_grad_(not frozen)

    def _targets(self, logits: Tensor, centre: str) -> Tensor:
        """The teacher's distributions (N, prototypes); remembers the logits for the centre."""
        logits = logits.float()
        self._seen[centre].append(logits.mean(0, keepdim=True))
        centred = logits - getattr(self.module, centre)
        targets: Tensor = (centred / self.config.teacher_temperature).softmax(-1)
        return targets

    def _cross_entropy(self, target: Tensor, output: Tensor) -> Tensor:
        log_p = (output / self.config.student_temperature).log_softmax(-1)
        return -(target * log_p).sum(-1).mean()

    def _hidden(self, count: int, generator: torch.Generator) -> Tensor:
        """(2 * count, tokens) bool: the hidden patches of both global crops of all images.

        In one of the two crops of each image, the share of the configuration, at least one.
        """
        tokens = (self.config.global_px // self.vit.patch_px) ** 2
        number = max(1, round(self.config.mask_share * tokens))
        order = torch.rand(count, tokens, generator=generator).argsort(dim=1)
        hidden = torch.zeros(count, tokens, dtype=torch.bool).scatter(1, order[:, :number], True)
        first = torch.rand(count, 1, generator=generator) < 0.5
        return torch.cat((hidden & first, hidden & ~first))

    def after_step(self, step: int, gone: float) -> None:
        """Move the teacher towards the student and the centres towards what was seen."""
        progress = max(gone, step / max(1, self.loop.steps))
        momentum = 1 - (1 - self.config.momentum) * (math.cos(math.pi * progress) + 1) / 2
        pairs = zip(
            self.module["teacher"].parameters(), self.module["student"].parameters(), strict=True
        )
        with torch.no_grad():
            for teacher, student in pairs:
                teacher.lerp_(student, 1 - momentum)
            for name in self.centres:
                mean = self.processes.mean(torch.stack(self._seen[name]).mean(0))
                getattr(self.module, name).lerp_(mean, 1 - self.config.centre_momentum)
                self._seen[name].clear()

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


def _spread(targets: Tensor) -> Tensor:
    """How much the distributions (N, prototypes) tell of their images: the entropy of their mean
    less the mean of their entropies. 0 if all are the same, be it one prototype or all alike."""
    return _entropy(targets.mean(0)) - _entropy(targets).mean()


def _entropy(shares: Tensor) -> Tensor:
    return -(shares * (shares + 1e-9).log()).sum(-1)


def _tokens(student: Any, views: Tensor, hidden: Tensor | None) -> Tensor:
    """All tokens of views, with the embeddings of hidden patches replaced by the mask token."""
    encoder: ViT = student["encoder"]
    if hidden is None:
        return encoder.tokens(views)

    def replace(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        token = student["mask"][0].to(output.dtype).view(1, -1, 1, 1)
        return torch.where(hidden.view(len(output), 1, *output.shape[-2:]), token, output)

    handle = encoder.net.patch_embed.proj.register_forward_hook(replace)
    try:
        return encoder.tokens(views)
    finally:
        handle.remove()
