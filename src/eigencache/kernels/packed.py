"""Which backend reads packed blocks: compiled code on a CPU for a few queries, plain PyTorch elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from eigencache.kernels import packed_cpu, reference
from eigencache.kernels.reference import Widths

_ROWS = 64  # queries of a bundle, above which unpacking once and a matrix product are faster
Kernel = Callable[[Tensor, tuple[Widths, ...], Tensor], Tensor]


@dataclass(frozen=True)
class PackedBackend:
    """`logits` and `sums` as in `reference.py`, of coefficients or, where `planes` is given, of planes."""

    name: str
    logits: Kernel
    sums: Kernel
    planes: Callable[[tuple[Widths, ...]], Tensor] | None = None  # A [bundles, most, most] with integers = A planes


REFERENCE = PackedBackend("reference", reference.logits, reference.sums)
CPU = PackedBackend("cpu", packed_cpu.logits, packed_cpu.sums, packed_cpu.planes)


def packed_backend(x: Tensor, rows: int) -> PackedBackend:
    """What reads the blocks of a bundle for so many queries or weights, of which x is one: gradients need PyTorch."""
    return CPU if x.device.type == "cpu" and rows <= _ROWS and not x.requires_grad else REFERENCE
