"""Tokens that some layers no longer hold: a sliding-window layer has dropped them, and the other layers predict them.

The transform needs a whole vector per token. Stage by stage, the columns of missing layers are filled with the values whose
coefficients are the most likely ones, given the stage before and the columns that are present. They are not returned when
the container is decoded.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from eigencache.codec.eigen.transform import StagedTransform
from eigencache.codec.layout import Layout


def fill_missing(
    z: Tensor,
    first: Tensor | None,
    missing: Mapping[int, int],
    layout: Layout,
    transform: StagedTransform,
    variances: Tensor,
) -> Tensor:
    """Fill the columns of layers that lack first tokens, by least squares with a Gaussian prior.

    Args:
        z: Vectors in the metric [batch, seq, width]; overwritten.
        first: What is predicted for the columns of the first stage [batch, seq, columns]; None: nothing.
        missing: Layer → how many of the first tokens it lacks.
        layout: Which columns belong to which layer.
        transform: The transform of the codec.
        variances: Variance of every coefficient over that of rounding it [coefficients]: the prior.

    Returns:
        z, with what layers lack replaced.
    """
    for begin, end in pairwise(sorted({0, *missing.values()})):
        present = torch.ones(z.shape[-1], dtype=torch.bool, device=z.device)
        for columns, part in zip(layout.spans, layout.parts, strict=True):
            present[slice(*columns)] = missing.get(part.layer_idx, 0) <= begin
        tokens = z[:, begin:end]
        expected: Tensor | float = 0.0 if first is None else first[:, begin:end]
        for i, (stage, prior) in enumerate(
            zip(transform.stages, variances.split([len(stage) for stage in transform.stages]), strict=True)
        ):
            here, columns = present[stage.start : stage.stop], tokens[..., stage.start : stage.stop]
            if i:
                expected = stage.expected(tokens[..., transform.stages[i - 1].start : transform.stages[i - 1].stop])
            if not here.all():
                gram = (stage.rows * here) @ stage.encoder + torch.diag(1 / prior)
                y = torch.linalg.solve(gram.mT, (((columns - expected) * here) @ stage.encoder).mT).mT
                columns.copy_(torch.where(here, columns, expected + y @ stage.rows))
    return z
