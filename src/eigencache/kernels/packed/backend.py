"""Which backend reads packed blocks: one that is asked for by name, or the fastest that there is on the device.

`vnni`: C on CPUs with AVX-512 VNNI; `cpu`: numba on others; `triton`: GPUs; `reference`: plain PyTorch, anywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from eigencache.errors import CodecError
from eigencache.kernels.packed import numba, reference, vnni
from eigencache.kernels.packed.format import Widths
from eigencache.kernels.packed.reference import AttentionQueries, PackedStorage
from eigencache.modes import constant

BackendName = Literal["reference", "cpu", "vnni", "triton"]
_ROWS = 64  # queries of a bundle; from about 100 on numba is slower than unpacking once and a matrix product
_CLOSE = 1e-3  # of the largest number: what a GPU's results may differ from plain PyTorch's
Kernel = Callable[[Tensor, tuple[Widths, ...], Tensor], Tensor]
Attention = Callable[[PackedStorage, AttentionQueries], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class PackedBackend:
    """What `reference.py` has: of coefficients or, where `planes` is given, of planes.

    No `attention`: what is between logits and sums is for the caller, as it is where masks are more than stretches.
    """

    name: BackendName
    logits: Kernel
    sums: Kernel
    encode: Callable[..., Tensor] = reference.encode
    planes: Callable[[tuple[Widths, ...]], Tensor] | None = None  # A [bundles, most, most] with integers = A planes
    attention: Attention | None = None


def _triton_attention(held: PackedStorage, asked: AttentionQueries) -> tuple[Tensor, Tensor, Tensor]:
    from eigencache.kernels.packed.triton import launch  # Triton is optional

    given = {name: getattr(asked, name) for name in ("constant", "turned", "visible", "softcap", "exact")}
    stored = held.keys, held.values, *held.widths, asked.queries
    if asked.others is None:
        means, lse = launch.attend(*stored, **given)
    else:
        means, lse = launch.attend_latents(*stored, asked.others, **given)
    return lse, torch.ones_like(lse).masked_fill_(lse == -torch.inf, 0), means


REFERENCE = PackedBackend("reference", reference.logits, reference.sums)
CPU = PackedBackend("cpu", numba.logits, numba.sums, planes=numba.planes)
VNNI = PackedBackend("vnni", vnni.logits, vnni.sums, attention=vnni.attention)


def packed_backend(x: Tensor, rows: int, name: BackendName | None = None) -> PackedBackend:
    """What reads the blocks of a bundle for `rows` queries or weights, of which x is one: gradients need PyTorch.

    `name`: the backend to use; None chooses. Raises `CodecError` where the backend that is named cannot be used.
    """
    if x.requires_grad:
        return REFERENCE
    if name is not None:
        return _named(name, x.device)
    if x.device.type == "cpu":
        if vnni.unavailable() is None:
            return VNNI
        return CPU if rows <= _ROWS else REFERENCE
    return triton_backend(x.device) if x.device.type == "cuda" and find_spec("triton") else REFERENCE


def _named(name: BackendName, device: torch.device) -> PackedBackend:
    if name not in get_args(BackendName):
        raise CodecError(f"backend {name!r}: choose one of {', '.join(get_args(BackendName))}")
    needed = {"cpu": "cpu", "vnni": "cpu", "triton": "cuda"}.get(name, device.type)
    if device.type != needed:
        raise CodecError(f"backend {name}: it runs on a {needed} device, and the model is on {device}")
    if name == "vnni" and (why := vnni.unavailable()):
        raise CodecError(f"backend vnni: {why}")
    if name == "triton":
        if not find_spec("triton"):
            raise CodecError("backend triton: the package triton is not installed: pip install 'eigencache[triton]'")
        return triton_backend(device)
    return {"reference": REFERENCE, "cpu": CPU, "vnni": VNNI}[name]


@cache
@constant
def triton_backend(device: torch.device) -> PackedBackend:
    """Triton on a device, after a look at whether it computes there what plain PyTorch does. Raises `CodecError` if not."""
    from eigencache.kernels.packed.triton import encode, launch

    backend = PackedBackend("triton", launch.logits, launch.sums, encode.encode, attention=_triton_attention)
    whole = replace(REFERENCE, attention=reference.attention)
    generator, widths = torch.Generator().manual_seed(0), (Widths(8, 16, 8),)
    packed = torch.randint(256, (1, 5, widths[0].nbytes), generator=generator, dtype=torch.uint8).to(device)
    x, q, encoder = (torch.randn(shape, generator=generator).to(device) for shape in ((320, 32), (4, 32), (32, 32)))
    limits = torch.tensor([[3, 0, 70, 0], [320, 100, 320, 320]], device=device)
    right, found = (_looked_at(one, packed, widths, x, q / 64, encoder, limits) for one in (whole, backend))
    for one, other in zip(found, right, strict=True):
        if not float((one - other).abs().max()) <= _CLOSE * float(other.abs().max()):
            raise CodecError(
                f"the Triton kernels of the live cache compute something else on {device} than PyTorch: please report it; "
                "without the package triton the cache works by PyTorch alone"
            )
    return backend


def _looked_at(
    backend: PackedBackend, packed: Tensor, widths: tuple[Widths, ...], x: Tensor, q: Tensor, encoder: Tensor, limits: Tensor
) -> list[Tensor]:
    """What a backend makes of one bundle: logits, sums, attention to values and to latents, and sums of what it encodes."""
    assert backend.attention is not None
    q, x, encoder = q[None, None], x[None, None], encoder[None]
    logits = backend.logits(packed, widths, q)
    weights = logits.softmax(-1)
    results = [logits, backend.sums(packed, widths, weights)]
    for others in (None, q):
        asked = AttentionQueries(q, others=others, visible=(limits[0, None, None], limits[1, None, None]))
        _, total, sums = backend.attention(PackedStorage([packed], [packed], (widths, widths)), asked)
        results.append(sums / total[..., None])
    encoded = backend.encode(x, torch.zeros_like(x[0, :, 0]), encoder, widths, (8,))
    return [*results, reference.sums(encoded, widths, weights)]
