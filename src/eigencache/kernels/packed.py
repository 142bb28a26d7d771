"""Which backend reads packed blocks: compiled code on a CPU for a few queries, Triton on a GPU, plain PyTorch elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from eigencache.errors import CodecError
from eigencache.kernels import packed_cpu, packed_vnni, reference
from eigencache.kernels.reference import Turned, Widths

_ROWS = 64  # queries of a bundle, above which on a CPU unpacking once and a matrix product are faster
_CLOSE = 1e-3  # of the largest number: what a GPU's results may differ from plain PyTorch's
Kernel = Callable[[Tensor, tuple[Widths, ...], Tensor], Tensor]
Storages = Sequence[Tensor]
Both = tuple[tuple[Widths, ...], tuple[Widths, ...]]
Attention = Callable[[Storages, Storages, Both, Tensor, Turned | None, bool], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class PackedBackend:
    """`logits` and `sums` as in `reference.py`, of coefficients or, where `planes` is given, of planes.

    `attention` does both at once with the softmax between them: of storages of keys and of values with their widths, and
    queries [batch, bundles, rows, most], the largest logit, the sum of weights relative to it [batch, bundles, rows], and
    what they weigh [batch, bundles, rows, most]. Its last argument: whether the model computes in float32.
    """

    name: str
    logits: Kernel
    sums: Kernel
    planes: Callable[[tuple[Widths, ...]], Tensor] | None = None  # A [bundles, most, most] with integers = A planes
    attention: Attention | None = None


def _vnni_attention(
    keys: Storages, values: Storages, widths: Both, queries: Tensor, turned: Turned | None, _: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return packed_vnni.attention(keys, values, widths, queries, turned and turned.logits())


def _triton_attention(
    keys: Storages, values: Storages, widths: Both, queries: Tensor, turned: Turned | None, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from eigencache.kernels import packed_triton  # Triton is optional

    means, lse = packed_triton.attend(keys, values, *widths, queries, turned=turned, exact=exact)
    return lse, torch.ones_like(lse).masked_fill_(lse == -torch.inf, 0), means


REFERENCE = PackedBackend("reference", reference.logits, reference.sums)
CPU = PackedBackend("cpu", packed_cpu.logits, packed_cpu.sums, packed_cpu.planes)
VNNI = PackedBackend("vnni", packed_vnni.logits, packed_vnni.sums, attention=_vnni_attention)


def packed_backend(x: Tensor, rows: int) -> PackedBackend:
    """What reads the blocks of a bundle for so many queries or weights, of which x is one: gradients need PyTorch."""
    if x.requires_grad or (x.device.type == "cpu" and rows > _ROWS):
        return REFERENCE
    if x.device.type == "cpu":
        return VNNI if packed_vnni.available() else CPU
    return triton_backend(x.device) if x.device.type == "cuda" and find_spec("triton") else REFERENCE


@cache
def triton_backend(device: torch.device) -> PackedBackend:
    """Triton on a device, after a look at whether it computes there what plain PyTorch does. Raises `CodecError` if not."""
    from eigencache.kernels import packed_triton

    backend = PackedBackend("triton", packed_triton.logits, packed_triton.sums, attention=_triton_attention)
    generator, widths = torch.Generator().manual_seed(0), (Widths(8, 16, 8),)
    packed = torch.randint(256, (1, 5, widths[0].nbytes), generator=generator, dtype=torch.uint8).to(device)
    q = torch.randn(1, 1, 4, widths[0].coefficients, generator=generator).to(device) / 64
    weights = REFERENCE.logits(packed, widths, q).softmax(-1)
    right = (
        REFERENCE.logits(packed, widths, q),
        REFERENCE.sums(packed, widths, weights),
        REFERENCE.sums(packed, widths, weights),
    )
    total, means = _triton_attention([packed], [packed], (widths, widths), q, None, True)[1:]
    found = backend.logits(packed, widths, q), backend.sums(packed, widths, weights), means / total[..., None]
    for one, other in zip(found, right, strict=True):
        if not float((one - other).abs().max()) <= _CLOSE * float(other.abs().max()):
            raise CodecError(
                f"the Triton kernels of the live cache compute something else on {device} than PyTorch: please report it; "
                "without the package triton the cache works by PyTorch alone"
            )
    return backend
