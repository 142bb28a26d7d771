"""The choice of the backend that reads packed blocks: a backend given by name, or the fastest available one.

`vnni`: C, for CPUs with AVX-512 VNNI. `cpu`: numba, for other CPUs. `triton`: for GPUs. `reference`: plain PyTorch, for any
device, and the only one that computes gradients. A named backend is used or refused with a reason; it is never replaced.
Without a name, `PackedBackend.name` tells which backend was chosen, and `unavailable` why a faster one was not.
"""

import logging
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
_LOG = logging.getLogger(__name__)
_DEVICES = {"cpu": "cpu", "vnni": "cpu", "triton": "cuda"}  # the type of device that a backend runs on
_ROWS = 64  # from about 100 queries of a bundle on, unpacking once and a matrix product are faster than numba
_TOLERANCE = 1e-3  # largest difference of a GPU's results from plain PyTorch's, relative to the largest number
Kernel = Callable[[Tensor, tuple[Widths, ...], Tensor], Tensor]
Attention = Callable[[PackedStorage, AttentionQueries], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class PackedBackend:
    """The functions that read and write packed blocks, with the signatures of `reference.py`.

    Attributes:
        name: name of the backend.
        logits: as `reference.logits`.
        sums: as `reference.sums`.
        encode: as `reference.encode`.
        planes: if set, `logits` takes queries, and `sums` gives results, in planes instead of coefficients;
            `planes(widths)` is the matrix A [bundles, most, most] with coefficients = A planes.
        attention: as `reference.attention`; None if the caller has to compute softmax between `logits` and `sums`.
    """

    name: BackendName
    logits: Kernel
    sums: Kernel
    encode: Callable[..., Tensor] = reference.encode
    planes: Callable[[tuple[Widths, ...]], Tensor] | None = None
    attention: Attention | None = None


REFERENCE = PackedBackend("reference", reference.logits, reference.sums)
CPU = PackedBackend("cpu", numba.logits, numba.sums, planes=numba.planes)
VNNI = PackedBackend("vnni", vnni.logits, vnni.sums, attention=vnni.attention)


def packed_backend(x: Tensor, rows: int, name: BackendName | None = None) -> PackedBackend:
    """Return the backend that reads packed blocks.

    Args:
        x: queries or weights; their device decides, and whether they require gradients.
        rows: number of queries or weights per bundle.
        name: backend to use; None chooses the fastest available one, or `reference` where x requires gradients.

    Raises:
        CodecError: the named backend does not exist or cannot be used, or Triton computes wrong results on this device.
    """
    if name is not None:
        return _named(name, x)
    if x.requires_grad:
        return REFERENCE
    if x.device.type == "cpu":
        if vnni.unavailable() is None:
            return VNNI
        return CPU if rows <= _ROWS else REFERENCE
    if x.device.type != "cuda":
        return REFERENCE
    if (reason := _refusal("triton", x.device)) is not None:
        _warn_once(f"backend triton cannot be used; plain PyTorch reads the packed blocks of the live cache: {reason}")
        return REFERENCE
    return triton_backend(x.device)


def unavailable(device: torch.device) -> dict[BackendName, str]:
    """Return why backends cannot be used on a device, by name; backends that can be used are missing.

    The first call builds the library of `vnni` where the CPU supports it. The compiler's message is part of the reason.
    """
    reasons = {name: _refusal(name, device) for name in get_args(BackendName)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _named(name: BackendName, x: Tensor) -> PackedBackend:
    """Return a backend by its name, or raise `CodecError` with the reason why it cannot be used for x."""
    if name not in get_args(BackendName):
        raise CodecError(f"`backend` {name!r} does not exist: use one of {', '.join(get_args(BackendName))}")
    if (reason := _refusal(name, x.device)) is not None:
        raise CodecError(f"`backend` {name!r} cannot be used: {reason}")
    if name == "reference":
        return REFERENCE
    if x.requires_grad:
        raise CodecError(
            f"`backend` {name!r} computes no gradients: use 'reference', or run the model under torch.no_grad()"
        )
    return triton_backend(x.device) if name == "triton" else {"cpu": CPU, "vnni": VNNI}[name]


def _refusal(name: BackendName, device: torch.device) -> str | None:
    """Return why a backend cannot be used on a device, or None if it can."""
    needed = _DEVICES.get(name, device.type)
    if device.type != needed:
        return f"it needs a {needed} device, the model is on {device}"
    if name == "vnni":
        return vnni.unavailable()
    if name == "triton" and not find_spec("triton"):
        return "the package triton is not installed: pip install 'eigencache[triton]'"
    return None


@cache
def _warn_once(message: str) -> None:
    _LOG.warning(message)


@cache
@constant
def triton_backend(device: torch.device) -> PackedBackend:
    """Return the Triton backend after comparing its results on a device with those of plain PyTorch.

    Raises:
        CodecError: the results differ.
    """
    from eigencache.kernels.packed.triton import encode, launch  # Triton is optional

    backend = PackedBackend("triton", launch.logits, launch.sums, encode.encode, attention=launch.attention)
    plain = replace(REFERENCE, attention=reference.attention)
    generator, widths = torch.Generator().manual_seed(0), (Widths(8, 16, 8),)
    packed = torch.randint(256, (1, 5, widths[0].nbytes), generator=generator, dtype=torch.uint8).to(device)
    x, q, encoder = (torch.randn(shape, generator=generator).to(device) for shape in ((320, 32), (4, 32), (32, 32)))
    limits = torch.tensor([[3, 0, 70, 0], [320, 100, 320, 320]], device=device)
    expected, results = (_sample_results(one, packed, widths, x, q / 64, encoder, limits) for one in (plain, backend))
    for result, right in zip(results, expected, strict=True):
        if not float((result - right).abs().max()) <= _TOLERANCE * float(right.abs().max()):
            raise CodecError(
                f"the Triton kernels of the live cache compute wrong results on {device}: please report it, and use "
                "`backend` 'reference' (plain PyTorch)"
            )
    return backend


def _sample_results(
    backend: PackedBackend, packed: Tensor, widths: tuple[Widths, ...], x: Tensor, q: Tensor, encoder: Tensor, limits: Tensor
) -> list[Tensor]:
    """Compute logits, sums, attention to values and to latents, and sums of encoded vectors, all of one bundle."""
    assert backend.attention is not None
    q, x, encoder = q[None, None], x[None, None], encoder[None]
    logits = backend.logits(packed, widths, q)
    weights = logits.softmax(-1)
    results = [logits, backend.sums(packed, widths, weights)]
    for rotary in (None, q):
        queries = AttentionQueries(q, projected_rotary=rotary, visible=(limits[0, None, None], limits[1, None, None]))
        _, total, sums = backend.attention(PackedStorage([packed], [packed], (widths, widths)), queries)
        results.append(sums / total[..., None])
    encoded = backend.encode(x, torch.zeros_like(x[0, :, 0]), encoder, widths, (8,))
    return [*results, reference.sums(encoded, widths, weights)]
