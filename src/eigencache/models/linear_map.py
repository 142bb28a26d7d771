"""The matrix of a linear module as it computes: with adapters on it, and of weights that are packed or kept elsewhere.

A weight says what a module computes only where the module is a plain `nn.Linear`. Any other is asked with unit vectors.
"""

from typing import Any

import torch
from torch import Tensor, nn

from eigencache.errors import UnsupportedArchitectureError


def linear_map(module: nn.Module, inputs: int, name: str = "") -> tuple[Tensor, Tensor | None]:
    """W [outputs, inputs] and b [outputs], None without a bias, of x ↦ W x + b as `module` computes it.

    `inputs`: numbers of a vector x. `name`: what errors call the module. Raises `UnsupportedArchitectureError` for a module
    that does not give one vector for each, of finite numbers.
    """
    if is_plain(module):
        return module.weight, module.bias  # type: ignore[return-value]
    like = next((p for p in module.parameters() if p.is_floating_point() and p.device.type != "meta"), torch.empty(0))
    units = torch.eye(inputs, dtype=like.dtype, device=like.device)
    try:
        found = module(torch.cat([units, 2 * units[:1]])[None])[0]
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError) as error:
        raise UnsupportedArchitectureError(
            f"{name or type(module).__name__}: its matrix cannot be asked of a {type(module).__name__} ({error})"
        ) from error
    if found.ndim != 2 or len(found) != inputs + 1 or not found.isfinite().all():
        raise UnsupportedArchitectureError(f"{name or type(module).__name__}: a {type(module).__name__} is no linear module")
    offset = 2 * found[0] - found[-1]
    return (found[:-1] - offset).mT, None if getattr(module, "bias", None) is None else offset


def is_plain(module: Any) -> bool:
    """Whether a module computes what its weight says: an `nn.Linear` of a dense weight in memory, without hooks."""
    if type(module) is not nn.Linear or "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    return has_dense_weight(module)


def has_dense_weight(module: Any) -> bool:
    """Whether the weight of a module is a plain tensor of floating-point numbers in memory."""
    weight = module.weight
    return type(weight.data) is Tensor and weight.is_floating_point() and weight.device.type != "meta"
