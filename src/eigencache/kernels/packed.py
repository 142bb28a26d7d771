"""Which backend reads packed blocks: compiled code on a CPU for a few queries, plain PyTorch elsewhere."""

from types import ModuleType

import torch
from torch import Tensor

from eigencache.kernels import packed_cpu, reference
from eigencache.kernels.reference import Widths

_ROWS = 64  # queries of a bundle, above which unpacking once and a matrix product are faster


def logits_of(packed: Tensor, widths: tuple[Widths, ...], queries: Tensor) -> Tensor:
    """As `reference.logits`."""
    return _module(packed.device, queries.shape[2]).logits(packed, widths, queries)


def sums_of(packed: Tensor, widths: tuple[Widths, ...], weights: Tensor) -> Tensor:
    """As `reference.sums`."""
    return _module(packed.device, weights.shape[2]).sums(packed, widths, weights)


def _module(device: torch.device, rows: int) -> ModuleType:
    return packed_cpu if device.type == "cpu" and rows <= _ROWS else reference
