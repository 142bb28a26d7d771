"""The matrix that a linear module computes, including adapters, packed weights and offloaded weights.

The weight of a plain `nn.Linear` or `Conv1D` is read. Any other module is called with unit vectors, because its weight alone
does not determine its output: PEFT adds adapters, bitsandbytes and torchao pack the weight, accelerate offloads it to disk,
and hooks change the output.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eigencache.errors import UnsupportedArchitectureError
from eigencache.models.devices import device_of

_NONLINEAR = 0.05  # relative error at which a module is not linear; 8-bit activations and bfloat16 stay below 0.01
_NO_BIAS = 1e-3  # relative to the largest weight: a smaller bias is rounding of zero


def linear_map(module: nn.Module, inputs: int, name: str = "") -> tuple[Tensor, Tensor | None]:
    """Return W [outputs, inputs] and b [outputs] of the map x ↦ W x + b that `module` computes.

    The result is on the device of the module. It is computed at every call, so that it includes adapters that were added,
    switched or merged. Cost for a module that is not plain: one call with `inputs` + 2 vectors.

    Args:
        module: Any module that maps [1, n, inputs] to [1, n, outputs].
        inputs: Size of the last dimension of its input.
        name: Name of the module in errors; default: its class.

    Returns:
        The matrix, and the bias; None for a module without a bias.

    Raises:
        UnsupportedArchitectureError: The module cannot be called with unit vectors, or is not linear.
    """
    if is_plain(module):
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.mT if isinstance(module, Conv1D) else weight, module.bias  # type: ignore[return-value]
    rows, bias = _measured(module, torch.eye(inputs), name or type(module).__name__)
    negligible = bias.detach().abs().amax() <= _NO_BIAS * rows.detach().abs().amax()
    return rows.mT, None if negligible else bias


def bias_of(module: nn.Module, inputs: int, name: str = "") -> Tensor | None:
    """Return b [outputs] of the map x ↦ W x + b that `module` computes; None if it is zero.

    Cost for a module that is not plain: one call with 3 vectors. Arguments and errors as for `linear_map`.
    """
    if is_plain(module):
        return module.bias  # type: ignore[return-value]
    rows, bias = _measured(module, torch.eye(1, inputs), name or type(module).__name__)
    return None if bias.detach().abs().amax() <= _NO_BIAS * rows.detach().abs().amax() else bias


def _measured(module: nn.Module, vectors: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return W x [n, outputs] for vectors [n, inputs], and b [outputs]; a further vector tests that the module is linear.

    All inputs are −1, 0 or 1, which every quantization of activations represents exactly.
    """
    signs = 1 - 2 * (torch.arange(len(vectors)) % 2)
    inputs = torch.cat([vectors, -vectors[:1], (signs @ vectors.long())[None]]).to(device_of(module), _dtype_of(module))
    try:
        outputs = module(inputs[None])[0]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError) as error:
        raise UnsupportedArchitectureError(
            f"{name}: the matrix cannot be read, because {type(module).__name__} fails on unit vectors "
            f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})"
        ) from error
    if outputs.ndim != 2 or len(outputs) != len(inputs) or not outputs.isfinite().all():
        raise UnsupportedArchitectureError(f"{name}: a {type(module).__name__} is not a linear module")
    bias = (outputs[0] + outputs[-2]) / 2
    rows = outputs[:-2] - bias
    expected = signs.to(rows) @ rows
    error = (outputs[-1] - bias - expected).detach().float().norm()
    if error > _NONLINEAR * expected.detach().float().norm():
        raise UnsupportedArchitectureError(
            f"{name}: a {type(module).__name__} is not linear: call model.eval() if it has dropout"
        )
    return rows, bias


def is_plain(module: Any) -> bool:
    """Return whether the weight alone determines the output: `nn.Linear` or `Conv1D`, dense, in memory, without hooks."""
    if type(module) not in (nn.Linear, Conv1D):
        return False
    weight: Any = module.weight
    hooked = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    dense = type(weight.data) is Tensor and weight.is_floating_point() and weight.dtype.itemsize > 1
    return not hooked and dense and weight.device.type != "meta"


def _dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point tensor of a module that is not packed; default: float32."""
    tensors = (*module.parameters(), *module.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1), torch.float32)
