"""k-means by cosine, to which prototypes are fitted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def spherical_kmeans(x: Tensor, clusters: int, seed: int, iterations: int) -> tuple[Tensor, Tensor]:
    """k-means by cosine on unit rows `x` (N, d): unit means `(clusters, d)` and each row's cluster `(N,)`.

    Where there are fewer distinct rows than clusters, the means left over are random unit vectors.
    """
    gen = torch.Generator(device="cpu").manual_seed(seed)
    means = _plus_plus(x, clusters, gen)
    for _ in range(iterations):
        best, owner = (x @ means.T).max(dim=1)
        total = torch.zeros_like(means).index_add_(0, owner, x)
        empty = torch.bincount(owner, minlength=clusters) == 0
        means = F.normalize(torch.where(empty[:, None], means, total), dim=1)
        worst = best.argsort()[: int(empty.sum())]  # empty clusters restart at the rows that fit worst
        restarts = empty.nonzero()[: len(worst), 0]
        distinct = best[worst] < 1 - 1e-6  # a row that equals its mean needs no mean of its own
        means[restarts[distinct]] = x[worst[distinct]]
    return means, (x @ means.T).argmax(dim=1)


def _plus_plus(x: Tensor, clusters: int, gen: torch.Generator) -> Tensor:
    """k-means++ seeding (Arthur & Vassilvitskii 2007) with 1 - cosine as the squared distance."""
    means = F.normalize(torch.randn(clusters, x.shape[1], generator=gen), dim=1).to(x)
    means[0] = x[int(torch.randint(len(x), (1,), generator=gen))]
    gap = (1 - x @ means[0]).clamp(min=0)
    for c in range(1, clusters):
        mass = gap.cpu().double()
        if mass.sum() <= 1e-9:
            break
        means[c] = x[int(torch.multinomial(mass, 1, generator=gen))]
        gap = torch.minimum(gap, (1 - x @ means[c]).clamp(min=0))
    return means
