"""Transforms of `eigen` that are fitted in float64 to drawn vectors, over heads, layers, or all columns."""

import numpy as np
import torch
from torch import Tensor

from eigen_chain import block_diagonal
from eigencache.codec.eigen.transform import Prediction, Stage, StagedTransform

HEADS, DIM = (2, 1, 3), (6, 10, 4)  # of three parts
WIDTH = sum(h * d for h, d in zip(HEADS, DIM, strict=True))
SPANS = {
    "joint": [(0, WIDTH)],
    "layer": [(0, 12), (12, 22), (22, WIDTH)],
    "head": [(0, 6), (6, 12), (12, 22), (22, 26), (26, 30), (30, WIDTH)],
}


def vectors(n: int = 600, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(9).normal(size=(WIDTH, WIDTH)))[0]
    return rng.normal(size=(n, WIDTH)) * np.geomspace(30, 0.1, WIDTH) @ turn + 5


def metric(seed: int = 0) -> list[np.ndarray]:
    """Blocks [heads, dim, dim] of M for every part, condition about 100, scales apart by another 100."""
    rng = np.random.default_rng(seed)

    def one(dim: int) -> np.ndarray:
        turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
        return (turn * np.geomspace(1, 0.01, dim)) @ turn.T * 10 ** rng.uniform(-1, 1)

    return [np.stack([one(d) for _ in range(h)]) for h, d in zip(HEADS, DIM, strict=True)]


def inverse_roots(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Blocks of M^{−1/2}."""
    values = [np.linalg.eigh(blocks) for blocks in metric()]
    return tuple(torch.from_numpy((u * v[:, None] ** -0.5) @ u.swapaxes(1, 2)).to(dtype) for v, u in values)


def planted(
    scope: str, chained: bool = False, weighed: bool = True, fine: int = 3, share: float = 1.0
) -> tuple[StagedTransform, np.ndarray]:
    """Fit every stage in float64 to the columns before it, undecoded.

    Args:
        scope: what a stage covers.
        chained: predict every stage from the one before.
        weighed: use the metric.
        fine: rows of a stage in 16 bits.
        share: share of its coefficients that a stage keeps, those of the largest variance.

    Returns:
        The transform, and the variance of every column of the rest in its basis.
    """
    x = vectors()
    blocks = inverse_roots() if weighed else ()
    z = (x - x.mean(0)) @ (np.linalg.inv(block_diagonal(blocks)) if weighed else np.eye(WIDTH))
    stages, spectrum, last = [], [], (0, 0)
    for a, b in SPANS[scope]:
        prediction, rest = None, z[:, a:b]
        if chained and stages:
            before = z[:, slice(*last)]
            spread = before.std(0)
            weights = np.linalg.lstsq(before / spread, rest, rcond=None)[0]
            prediction = Prediction.of(torch.from_numpy(weights), torch.from_numpy(spread))
            rest = rest - before / spread @ weights
        values, u = np.linalg.eigh(rest.T @ rest / len(rest))
        kept = max(1, round(share * (b - a)))
        stages.append(Stage.of(a, torch.from_numpy(u.T[::-1][:kept].copy()), fine, prediction))
        spectrum.append(values[::-1])
        last = a, b
    return StagedTransform(torch.from_numpy(x.mean(0)).float(), tuple(stages), blocks), np.concatenate(spectrum)


def weighed(transform: StagedTransform, seed: int = 1) -> Tensor:
    return transform.weighed(torch.from_numpy(vectors(seed=seed)).float() - transform.mean)
