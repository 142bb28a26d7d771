"""The kernels of `vnni.c` for CPUs with AVX-512 VNNI, called by ctypes.

The C compiler of the machine builds the library once; `compiled.py` keeps it in the user's cache folder.
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
from eigencache.kernels.packed.format import BLOCK, Widths, bundle_layout, most_coefficients
from eigencache.kernels.packed.reference import AttentionQueries, PackedStorage

_LOG = logging.getLogger(__name__)
_SOURCES = Path(__file__).with_suffix(".c"), Path(__file__).with_suffix(".h")
_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "fma")
_FLAGS = ("-O2", "-shared", "-fPIC", "-std=gnu11", "-fopenmp", *(f"-m{feature}" for feature in _FEATURES))
_LIBRARIES = ("-nostdlib", "-lm", "-lc", "-lgcc")  # OpenMP is PyTorch's, which is loaded already


def logits(packed: Tensor, widths: tuple[Widths, ...], queries: Tensor) -> Tensor:
    """Return the result of `reference.logits`."""
    q = queries.float().contiguous()
    out = torch.empty(*q.shape[:3], packed.shape[1] * BLOCK)
    _call_on_items("packed_logits", packed, widths, q, out)
    return out


def sums(packed: Tensor, widths: tuple[Widths, ...], weights: Tensor) -> Tensor:
    """Return the result of `reference.sums`."""
    w = weights.float().contiguous()
    out = torch.zeros(*w.shape[:3], most_coefficients(widths))
    _call_on_items("packed_sums", packed, widths, w, out)
    return out


def attention(storage: PackedStorage, queries: AttentionQueries) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result of `reference.attention`, computed tile by tile.

    Memory does not grow with the number of tokens, except for the logits of a rotated mean.
    """
    q, threads = queries.projected.float().contiguous(), torch.get_num_threads()
    batch, bundles, rows = q.shape[:3]
    items, most = batch * bundles, most_coefficients(storage.widths[0 if queries.projected_rotary is not None else 1])
    parts = -(-threads // items)  # every chunk is cut in parts where there are fewer items than threads
    tops = torch.full((parts, batch, bundles, rows), -torch.inf)
    totals, sums = torch.zeros(tops.shape), torch.zeros(*tops.shape, most)
    slots = zip((storage.keys, storage.values), storage.widths, strict=True)
    codes = [[_codes_of(chunk, widths) for chunk in chunks] for chunks, widths in slots]
    arrays = [(_Codes * len(storage.keys))(*one) for one in codes]  # copies: `codes` keeps the tensors alive
    mean = queries.rotated_mean
    optional = [
        None if x is None else x.float().contiguous()
        for x in (queries.projected_rotary, queries.constant, mean and mean.logits())
    ]
    limits = [None if x is None else x.int().expand(q.shape[:3]).contiguous() for x in queries.visible or (None, None)]
    sizes = len(storage.keys), parts, items, bundles, rows, 3 if queries.exact else 2, threads
    addresses = [None if x is None else x.data_ptr() for x in (q, *optional, *limits)]
    outputs = tops.data_ptr(), totals.data_ptr(), sums.data_ptr()
    arguments = _Attention(*arrays, *sizes, *addresses, queries.softcap or 0, *outputs)
    _call("packed_attention", ctypes.byref(arguments))
    if parts == 1:
        return tops[0], totals[0], sums[0]
    top = tops.amax(0)
    shares = (tops - top).nan_to_num_(0).exp_()
    return top, (totals * shares).sum(0), (sums * shares[..., None]).sum(0)


class _Codes(ctypes.Structure):
    """`Codes` of vnni.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("bundles", ctypes.c_void_p),
        ("most", ctypes.c_int64),
    ]


class _Attention(ctypes.Structure):
    """`Attention` of vnni.c."""

    _fields_ = [
        *((name, ctypes.POINTER(_Codes)) for name in ("keys", "others")),
        *((name, ctypes.c_int64) for name in ("storages", "parts", "items", "bundles", "rows", "digits", "threads")),
        *((name, ctypes.c_void_p) for name in ("queries", "other_queries", "constant", "extra", "first", "stop")),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("tops", "totals", "sums")),
    ]


def _codes_of(packed: Tensor, widths: tuple[Widths, ...]) -> _Codes:
    """Describe a tensor of packed blocks to C."""
    if packed.stride(2) != 1:
        raise ValueError(f"`packed` must have the bytes of a block side by side, found a stride of {packed.stride(2)}")
    bundles = bundle_layout(widths)
    codes = _Codes(packed.data_ptr(), *packed.stride()[:2], packed.shape[1], bundles.data_ptr(), most_coefficients(widths))
    codes.owners = packed, bundles  # an address alone keeps no tensor alive
    return codes


def _call_on_items(name: str, packed: Tensor, widths: tuple[Widths, ...], given: Tensor, out: Tensor) -> None:
    """Call a function of the library for all bundles of all sequences."""
    batch, bundles, rows = given.shape[:3]
    sizes = (ctypes.c_int64(x) for x in (batch * bundles, bundles, rows))
    tensors = (ctypes.c_void_p(x.data_ptr()) for x in (given, out))
    codes = _codes_of(packed, widths)
    _call(name, ctypes.byref(codes), *sizes, *tensors, ctypes.c_int64(torch.get_num_threads()))


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the library; it returns nonzero when it is out of memory."""
    if _library()[name](*arguments):
        raise MemoryError(f"{name}: not enough memory for the working space of a thread")


@cache
def unavailable() -> str | None:
    """Return why the kernels cannot be used on this machine, or None if they can.

    The first call builds the library. If that fails, it logs one warning with the compiler's message.
    """
    has = binding.get_host_cpu_features()
    if lacking := [feature for feature in _FEATURES if not has.get(feature, False)]:
        return f"this CPU lacks {', '.join(lacking)}"
    try:
        _library()
    except CompilationError as error:
        _LOG.warning("backend vnni cannot be built; slower backends read the packed blocks of the live cache: %s", error)
        return f"the library cannot be built: {error}"
    return None


@cache
def _library() -> ctypes.CDLL:
    """Load the library, building it if needed. Raises `CompilationError`."""
    return load(_SOURCES, _FLAGS, _LIBRARIES)
