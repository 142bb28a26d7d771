"""The matrix of a linear module as the module computes it: with its adapters, and with weights that are packed or offloaded.

The weight of a plain `nn.Linear` or `Conv1D` is read. Every other module is called with unit vectors, because its weight
does not say what it computes: PEFT adds adapters, bitsandbytes and torchao pack the weight, accelerate keeps it on disk, and
hooks change the output.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eigencache.errors import UnsupportedArchitectureError
from eigencache.models.devices import device_of

_NONLINEAR = 0.05  # relative error at which a module is not linear; 8-bit activations and bfloat16 stay below 0.01
_NO_BIAS = 1e-3  # of the largest weight: what rounding leaves of a bias that is zero


def linear_map(module: nn.Module, inputs: int, name: str = "") -> tuple[Tensor, Tensor | None]:
    """Return W [outputs, inputs] and b [outputs] of the map x ↦ W x + b that `module` computes.

    The result is on the device of the module and is made anew at every call, so that adapters that are added, switched or
    merged are seen. Cost for a module that is not plain: one call with `inputs` + 2 vectors.

    Args:
        module: any module that maps [1, n, inputs] to [1, n, outputs].
        inputs: size of the last dimension of its input.
        name: name of the module in errors; default: its class.

    Returns:
        The matrix, and the bias or None where the module adds none.

    Raises:
        UnsupportedArchitectureError: the module cannot be called with unit vectors, or is not linear.
    """
    if is_plain(module):
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.mT if isinstance(module, Conv1D) else weight, module.bias  # type: ignore[return-value]
    rows, bias = _asked(module, torch.eye(inputs), name or type(module).__name__)
    negligible = bias.detach().abs().amax() <= _NO_BIAS * rows.detach().abs().amax()
    return rows.mT, None if negligible else bias


def bias_of(module: nn.Module, inputs: int, name: str = "") -> Tensor | None:
    """Return b [outputs] of the map x ↦ W x + b that `module` computes, None where its biases are all zero.

    Two vectors are enough for that. Arguments and errors as for `linear_map`.
    """
    if is_plain(module):
        return module.bias  # type: ignore[return-value]
    rows, bias = _asked(module, torch.eye(1, inputs), name or type(module).__name__)
    return None if bias.detach().abs().amax() <= _NO_BIAS * rows.detach().abs().amax() else bias


def _asked(module: nn.Module, vectors: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return W x [n, outputs] of vectors [n, inputs], and b [outputs]. A last vector tests that the module is linear.

    All numbers are −1, 0 and 1, which every quantization of activations represents exactly.
    """
    signs = 1 - 2 * (torch.arange(len(vectors)) % 2)
    asked = torch.cat([vectors, -vectors[:1], (signs @ vectors.long())[None]]).to(device_of(module), _dtype_of(module))
    try:
        found = module(asked[None])[0]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError) as error:
        raise UnsupportedArchitectureError(
            f"{name}: its matrix cannot be read, because {type(module).__name__} fails on unit vectors "
            f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})"
        ) from error
    if found.ndim != 2 or len(found) != len(asked) or not found.isfinite().all():
        raise UnsupportedArchitectureError(f"{name}: a {type(module).__name__} is no linear module")
    bias = (found[0] + found[-2]) / 2
    rows = found[:-2] - bias
    expected = signs.to(rows) @ rows
    error = (found[-1] - bias - expected).detach().float().norm()
    if error > _NONLINEAR * expected.detach().float().norm():
        raise UnsupportedArchitectureError(
            f"{name}: a {type(module).__name__} is not linear: call model.eval() if it has a dropout"
        )
    return rows, bias


def is_plain(module: Any) -> bool:
    """Return whether a module computes what its weight says: `nn.Linear` or `Conv1D`, dense, in memory, without hooks."""
    if type(module) not in (nn.Linear, Conv1D):
        return False
    weight: Any = module.weight
    hooked = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    dense = type(weight.data) is Tensor and weight.is_floating_point() and weight.dtype.itemsize > 1
    return not hooked and dense and weight.device.type != "meta"


def _dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point tensor of a module that is no packed weight; default: float32."""
    tensors = (*module.parameters(), *module.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1), torch.float32)
