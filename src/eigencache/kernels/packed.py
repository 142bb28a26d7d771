"""Which backend reads packed blocks: compiled code on a CPU for a few queries, plain PyTorch elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from eigencache.kernels import packed_cpu, packed_vnni, reference
from eigencache.kernels.reference import Widths

_ROWS = 64  # queries of a bundle, above which unpacking once and a matrix product are faster
Kernel = Callable[[Tensor, tuple[Widths, ...], Tensor], Tensor]
_Storages = Sequence[Tensor]
Attention = Callable[
    [_Storages, _Storages, tuple[tuple[Widths, ...], tuple[Widths, ...]], Tensor, Tensor | None],
    tuple[Tensor, Tensor, Tensor],
]


@dataclass(frozen=True)
class PackedBackend:
    """`logits` and `sums` as in `reference.py`, of coefficients or, where `planes` is given, of planes.

    `attention` does both at once, with the softmax between them (`packed_vnni.attention`).
    """

    name: str
    logits: Kernel
    sums: Kernel
    planes: Callable[[tuple[Widths, ...]], Tensor] | None = None  # A [bundles, most, most] with integers = A planes
    attention: Attention | None = None


REFERENCE = PackedBackend("reference", reference.logits, reference.sums)
CPU = PackedBackend("cpu", packed_cpu.logits, packed_cpu.sums, packed_cpu.planes)
VNNI = PackedBackend("vnni", packed_vnni.logits, packed_vnni.sums, attention=packed_vnni.attention)


def packed_backend(x: Tensor, rows: int) -> PackedBackend:
    """What reads the blocks of a bundle for so many queries or weights, of which x is one: gradients need PyTorch."""
    if x.device.type != "cpu" or rows > _ROWS or x.requires_grad:
        return REFERENCE
    return VNNI if packed_vnni.available() else CPU
