"""How good vectors are without training anything on them: neighbours and spread. Knows no images.

Sources: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination (CVPR
2018), section 3.4, for the weighted vote, with DINO's k = 20 and temperature 0.07; Garrido et al.,
RankMe (ICML 2023), for the effective rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nnf

NEIGHBOURS = 20
TEMPERATURE = 0.07


def neighbours(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The most similar vectors of a bank.

    Args:
        queries: (Q, dim).
        bank: (N, dim).
        k: how many; at most N are given.

    Returns:
        (Q, k) cosine similarities, falling, and (Q, k) int64 indices into the bank.
    """
    similarity = nnf.normalize(queries.float(), dim=-1) @ nnf.normalize(bank.float(), dim=-1).T
    best = similarity.topk(min(k, len(bank)), dim=-1)
    return best.values, best.indices


def knn_classes(queries: Tensor, bank: Tensor, classes: Tensor, *, k: int = NEIGHBOURS) -> Tensor:
    """(Q,) int64: the class that most of the k neighbours vote for, by exp(similarity / 0.07).

    Args:
        queries: (Q, dim).
        bank: (N, dim).
        classes: (N,) int64 classes of the bank.
        k: neighbours that vote.
    """
    similarity, index = neighbours(queries, bank, k)
    votes = torch.zeros(len(queries), int(classes.max()) + 1, device=queries.device)
    votes.scatter_add_(1, classes[index], torch.exp(similarity / TEMPERATURE))
    return votes.argmax(dim=-1)


def spread(vectors: Tensor) -> float:
    """Standard deviation of unit vectors (N, dim) times sqrt(dim), averaged over the dimensions.

    Near 0 where all have collapsed to one direction, near 1 where they point everywhere.
    """
    unit = nnf.normalize(vectors.float(), dim=-1)
    return float(unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5)


def effective_rank(vectors: Tensor) -> float:
    """Exponential of the entropy of the singular values of (N, dim) vectors: 1 .. min(N, dim)."""
    values = torch.linalg.svdvals(vectors.double().cpu())
    p = values / values.sum().clamp_min(1e-12)
    return float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))
