"""Karhunen–Loève bases of vectors in a block-diagonal metric, for groups of columns of any width (THEORY 5).

Where a group has more columns than there are vectors, the Gram matrix of the vectors is decomposed instead of the
covariance. It gives the same leading directions, as many as there are vectors.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from eigencache.codec.eigen.transform import Basis
from eigencache.codec.layout import Layout
from eigencache.spectral.metric import block_product, regularized, roots
from eigencache.spectral.spectrum import eigenbasis_of

JointScope = Literal["head", "layer", "kind", "joint"]
_ROWS = 8192  # vectors per product in float32; the sums are float64


def spans_of(layout: Layout, scope: JointScope) -> list[tuple[int, int]]:
    """Return (start, stop) of the columns that share a basis: each head, each slot of a layer, each kind, or all."""
    spans = layout.spans
    if scope == "joint":
        return [(0, layout.width)]
    if scope == "kind":
        slots = groupby(range(len(layout.parts)), key=lambda i: layout.parts[i].slot)
        members = [list(group) for _, group in slots]
        return [(spans[group[0]][0], spans[group[-1]][1]) for group in members]
    if scope == "layer":
        return spans
    return [
        (start + i, start + i + part.dim)
        for (start, _), part in zip(spans, layout.parts, strict=True)
        for i in range(0, part.width, part.dim)
    ]


def scaled_metrics(metrics: Sequence[Tensor], alpha: float) -> tuple[tuple[Tensor, ...], ...]:
    """Return the blocks of M^α, M^{α/2} and M^{−α/2} in float32, M being regularized with a mean diagonal of 1.

    Args:
        metrics: blocks of M [heads, dim, dim] per part; empty for the Frobenius norm.
        alpha: exponent of the metric.

    Returns:
        Three tuples with one tensor [heads, dim, dim] per part, all empty if `metrics` is.
    """
    if not metrics:
        return (), (), ()
    diagonal = torch.cat([m.diagonal(dim1=-2, dim2=-1).flatten() for m in metrics]).mean()
    floor = 1e-6 * diagonal  # keeps heads invertible that nothing reads
    full, root, inverse = [], [], []
    for blocks in metrics:
        size = blocks.shape[-1]
        usable = [regularized((b + floor * torch.eye(size, dtype=b.dtype)) / diagonal) for b in blocks.double().cpu()]
        pairs = [roots(b, alpha) for b in usable]
        root.append(torch.stack([r for r, _ in pairs]))
        inverse.append(torch.stack([i for _, i in pairs]))
        full.append(root[-1] @ root[-1])
    return tuple(tuple(m.float() for m in blocks) for blocks in (full, root, inverse))


def basis_of(
    vectors: Tensor, start: int, stop: int, root: Sequence[Tensor], inverse: Sequence[Tensor]
) -> tuple[Basis, Tensor]:
    """Return the basis of a group of columns and its eigenvalues.

    Directions with an eigenvalue below 1e-9 of the largest are left out. Rounding of the float32 products can add
    directions above that limit. They are orthogonal to the others and do no harm.

    Args:
        vectors: centered vectors [n, width].
        start: first column.
        stop: end of the columns, exclusive.
        root: blocks of M^{α/2} per part.
        inverse: blocks of M^{−α/2} per part.

    Returns:
        The basis, and its eigenvalues in descending order [r] float64.
    """
    n, width = len(vectors), stop - start
    chosen = torch.zeros(vectors.shape[1]).index_fill_(0, torch.arange(start, stop), 1)
    weighed = lambda rows: block_product(rows * chosen, root)[:, start:stop]  # noqa: E731 - used twice
    if width <= n:
        covariance = sum(((z := weighed(rows)).mT @ z).double() for rows in vectors.split(_ROWS)) / n
        eigenvalues, basis = eigenbasis_of(covariance)  # type: ignore[arg-type]
    else:
        z = weighed(vectors)
        eigenvalues, left = eigenbasis_of((z @ z.mT).double() / n)
        basis = torch.linalg.qr(z.mT.double() @ left).Q
    kept = int((eigenvalues > 1e-9 * eigenvalues[0]).sum())
    wide = torch.zeros(kept, vectors.shape[1])
    wide[:, start:stop] = basis[:, :kept].mT.float()
    return Basis.of(start, block_product(wide, inverse)[:, start:stop]), eigenvalues[:kept]
