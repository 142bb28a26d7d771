"""The mean of keys before rotation, rotated to given positions.

A codec subtracts it from keys that are stored after rotation, and adds it back when it decodes them (THEORY 8).
"""

import torch
from torch import Tensor

from eigencache.spectral.rope import Angles, Rotation, rotate


def rotated_mean(mean: Tensor, rotation: Rotation, positions: Tensor) -> Tensor:
    """Return R_n μ, the mean μ as the model rotates keys at every position n.

    Args:
        mean: μ, the mean of the keys before rotation [heads, dim].
        rotation: Rotation of the layer.
        positions: Positions n [batch, tokens]; they may be negative.

    Returns:
        [batch, heads, tokens, dim] in the dtype and on the device of `mean`.
    """
    theta = rotation.frequencies
    phase = positions.to(theta.device, torch.float64)[:, None, :, None] * theta
    angles = Angles(*((rotation.scale * part).float().to(mean.device) for part in (phase.cos(), phase.sin())))
    means = mean[None, :, None].expand(len(positions), -1, positions.shape[1], -1)
    return rotate(means, angles, rotation.pairing)
