"""The columns of every stage of `eigen`, and the metric that its vectors are weighed with."""

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from eigencache.codec.layout import Layout
from eigencache.spectral.metric import completed, regularized, roots

EigenScope = Literal["head", "layer", "groups", "joint"]
_HALF = 500.0  # largest condition of a matrix that is stored in float16, whose relative precision is 1/2048
_SMALLEST = 1e-3  # smallest singular value of such a matrix; the largest is its inverse


def spans_of(layout: Layout, scope: EigenScope, group: int) -> list[tuple[int, int]]:
    """Return (start, stop) of the columns of every stage: heads, slots of layers, groups of layers, or all columns.

    Args:
        layout: parts layer by layer.
        scope: what a stage covers.
        group: layers of a stage at scope `groups`; the last one may have fewer.
    """
    spans = layout.spans
    if scope == "joint":
        return [(0, layout.width)]
    if scope == "layer":
        return spans
    if scope == "groups":
        layers = list(dict.fromkeys(part.layer_idx for part in layout.parts))
        place = {layer_idx: i // group for i, layer_idx in enumerate(layers)}
        members = groupby(range(len(spans)), key=lambda i: place[layout.parts[i].layer_idx])
        groups = [list(indices) for _, indices in members]
        return [(spans[g[0]][0], spans[g[-1]][1]) for g in groups]
    return [
        (start + i, start + i + part.dim)
        for (start, _), part in zip(spans, layout.parts, strict=True)
        for i in range(0, part.width, part.dim)
    ]


def scaled_metrics(
    metrics: Sequence[Tensor], alpha: float, live: Sequence[Tensor] | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the blocks of M^{α/2} and M^{−α/2} in float32, M being regularized with a mean diagonal of 1.

    Both are zero in rows and columns of dead dimensions: no error is made there, so M is that of the live ones.

    Args:
        metrics: blocks of M [heads, dim, dim] per part; empty for the Frobenius norm.
        alpha: exponent of the metric.
        live: dimensions that vary, bool [heads, dim] per part; by default all.

    Returns:
        Two tuples with one tensor [heads, dim, dim] per part, all empty if `metrics` is.
    """
    if not metrics:
        return (), ()
    diagonal = torch.cat([m.diagonal(dim1=-2, dim2=-1).flatten() for m in metrics]).mean()
    floor = 1e-6 * diagonal  # keeps heads invertible that nothing reads
    root, inverse = (tuple(torch.zeros(m.shape) for m in metrics) for _ in range(2))
    for part, blocks in enumerate(metrics):
        for head, block in enumerate(blocks.double().cpu()):
            used = torch.arange(len(block)) if live is None else live[part][head].nonzero().flatten()
            if len(used):
                usable = block[used][:, used] + floor * torch.eye(len(used), dtype=block.dtype)
                both = roots(regularized(usable / diagonal), alpha)
                for whole, m in zip((root, inverse), both, strict=True):
                    whole[part][head][used[:, None], used] = m.float()
    return root, inverse


def stored_inverses(inverses: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return blocks of R⁻¹ as they are stored: in float16 if all of them are well conditioned, or else in float32."""
    singular = [torch.linalg.svdvals(completed(blocks.double())) for blocks in inverses]
    half = all(
        bool((s[:, 0] < _HALF * s[:, -1]).all()) and float(s.min()) > _SMALLEST and float(s.max()) < 1 / _SMALLEST
        for s in singular
    )
    return tuple(blocks.half() if half else blocks.float() for blocks in inverses)
