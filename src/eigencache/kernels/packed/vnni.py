"""`vnni.c`: built once by the machine's C compiler where the processor has AVX-512 VNNI, and called from here.

`compiled.py` keeps the library in the user's cache folder.
"""

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from llvmlite import binding
from torch import Tensor

from eigencache.kernels.compiled import CompilationError, load
from eigencache.kernels.packed.format import BLOCK, Widths, bundles_of, most_coefficients
from eigencache.kernels.packed.reference import AttentionQueries, PackedStorage

_LOG = logging.getLogger(__name__)
_SOURCES = Path(__file__).with_suffix(".c"), Path(__file__).with_suffix(".h")
_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "fma")
_FLAGS = ("-O2", "-shared", "-fPIC", "-std=gnu11", "-fopenmp", *(f"-m{feature}" for feature in _FEATURES))
_LIBRARIES = ("-nostdlib", "-lm", "-lc", "-lgcc")  # threads are those of PyTorch's OpenMP, which is loaded already


def logits(packed: Tensor, widths: tuple[Widths, ...], queries: Tensor) -> Tensor:
    """As `reference.logits`."""
    q = queries.float().contiguous()
    found = torch.empty(*q.shape[:3], packed.shape[1] * BLOCK)
    _of_items("packed_logits", packed, widths, q, found)
    return found


def sums(packed: Tensor, widths: tuple[Widths, ...], weights: Tensor) -> Tensor:
    """As `reference.sums`."""
    w = weights.float().contiguous()
    found = torch.zeros(*w.shape[:3], most_coefficients(widths))
    _of_items("packed_sums", packed, widths, w, found)
    return found


def attention(held: PackedStorage, asked: AttentionQueries) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.attention`, tile by tile: nothing of the past's length is made, but where a mean turns."""
    q, threads = asked.queries.float().contiguous(), torch.get_num_threads()
    batch, bundles, rows = q.shape[:3]
    items, most = batch * bundles, most_coefficients(held.widths[0 if asked.others is not None else 1])
    parts = -(-threads // items)  # of every storage, where there are fewer bundles than threads
    tops = torch.full((parts, batch, bundles, rows), -torch.inf)
    totals, found = torch.zeros(tops.shape), torch.zeros(*tops.shape, most)
    described = [[_described(x, w) for x in xs] for xs, w in zip((held.keys, held.values), held.widths, strict=True)]
    codes = [(_Codes * len(held.keys))(*one) for one in described]  # copies, which own nothing: `described` does
    rest = [
        None if x is None else x.float().contiguous()
        for x in (asked.others, asked.constant, asked.turned and asked.turned.logits())
    ]
    seen = [None if x is None else x.int().expand(q.shape[:3]).contiguous() for x in asked.visible or (None, None)]
    numbers = len(held.keys), parts, items, bundles, rows, 3 if asked.exact else 2, threads
    addresses = [None if x is None else x.data_ptr() for x in (q, *rest, *seen)]
    given = _Attention(
        *codes, *numbers, *addresses, asked.softcap or 0, tops.data_ptr(), totals.data_ptr(), found.data_ptr()
    )
    _call("packed_attention", ctypes.byref(given))
    if parts == 1:
        return tops[0], totals[0], found[0]
    top = tops.amax(0)
    shares = (tops - top).nan_to_num_(0).exp_()
    return top, (totals * shares).sum(0), (found * shares[..., None]).sum(0)


class _Codes(ctypes.Structure):
    """As in C, and so the next."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("bundles", ctypes.c_void_p),
        ("most", ctypes.c_int64),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.POINTER(_Codes)) for name in ("keys", "others")),
        *((name, ctypes.c_int64) for name in ("storages", "parts", "items", "bundles", "rows", "digits", "threads")),
        *((name, ctypes.c_void_p) for name in ("queries", "other_queries", "constant", "extra", "first", "stop")),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("tops", "totals", "sums")),
    ]


def _described(packed: Tensor, widths: tuple[Widths, ...]) -> _Codes:
    if packed.stride(2) != 1:
        raise ValueError("bytes of a block that do not lie side by side")
    bundles = bundles_of(widths)
    codes = _Codes(packed.data_ptr(), *packed.stride()[:2], packed.shape[1], bundles.data_ptr(), most_coefficients(widths))
    codes.owners = packed, bundles  # an address alone does not keep what it is the address of
    return codes


def _of_items(name: str, packed: Tensor, widths: tuple[Widths, ...], given: Tensor, found: Tensor) -> None:
    batch, bundles, rows = given.shape[:3]
    sizes = (ctypes.c_int64(x) for x in (batch * bundles, bundles, rows))
    tensors = (ctypes.c_void_p(x.data_ptr()) for x in (given, found))
    codes = _described(packed, widths)
    _call(name, ctypes.byref(codes), *sizes, *tensors, ctypes.c_int64(torch.get_num_threads()))


def _call(name: str, *given: Any) -> None:
    if _library()[name](*given):
        raise MemoryError(f"{name}: no memory for a thread's working space")


@cache
def unavailable() -> str | None:
    """Why the kernels cannot be used here; None where they can. The first call builds the library, or warns."""
    has = binding.get_host_cpu_features()
    if lacking := [feature for feature in _FEATURES if not has.get(feature, False)]:
        return f"this CPU has no {', '.join(lacking)}"
    try:
        _library()
    except CompilationError as error:
        _LOG.warning("the compiled kernels of the live cache cannot be used, slower portable ones are: %s", error)
        return str(error)
    return None


@cache
def _library() -> ctypes.CDLL:
    """Raises `CompilationError` where it can be neither found nor built."""
    return load(_SOURCES, _FLAGS, _LIBRARIES)
