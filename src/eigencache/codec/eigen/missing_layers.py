"""Tokens that some layers no longer hold: a sliding-window layer has dropped them, and the other layers predict them.

The transform needs a whole vector per token. The columns of missing layers are filled with the values whose coefficients
are the most likely ones, given the columns that are present; they are not returned when the container is decoded.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from eigencache.codec.eigen.transform import JointTransform
from eigencache.codec.layout import Layout


def fill_missing(
    x: Tensor,
    expected: Tensor,
    missing: Mapping[int, int],
    layout: Layout,
    transform: JointTransform,
    step: float,
    variances: Tensor,
) -> Tensor:
    """Fill the columns of layers that lack first tokens, by least squares in the metric with a Gaussian prior.

    Args:
        x: Vectors [batch, seq, width]; overwritten.
        expected: The vectors predicted without coefficients, broadcastable to x.
        missing: Layer → how many of the first tokens it lacks.
        layout: Which columns belong to which layer.
        transform: The transform of the codec.
        step: Its quantization step.
        variances: Mean square of every quantized coefficient [coefficients]: the variance of the prior.

    Returns:
        x, with what layers lack replaced.
    """
    expected = expected.expand_as(x)
    prior = torch.diag(1 / (12 * variances))  # variance of rounding to integers over that of the coefficient
    rows = transform.decode(torch.eye(transform.coefficients, device=x.device), step)
    for first, stop in pairwise(sorted({0, *missing.values()})):
        present = torch.ones(x.shape[-1], dtype=torch.bool, device=x.device)
        for columns, part in zip(layout.spans, layout.parts, strict=True):
            present[slice(*columns)] = missing.get(part.layer_idx, 0) <= first
        gram = transform.encode(rows * present, step)
        known = (x[:, first:stop] - expected[:, first:stop]) * present
        fitted = transform.encode(known, step)
        y = torch.linalg.solve(gram.mT + prior, fitted.mT).mT
        filled = expected[:, first:stop] + transform.decode(y, step)
        x[:, first:stop] = torch.where(present, x[:, first:stop], filled)
    return x
