"""`packed_vnni.c`: built once by the machine's C compiler where the processor has AVX-512 VNNI, and called from here.

The library is kept in the user's cache folder, under a name that changes with the source.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from llvmlite import binding
from torch import Tensor

from eigencache.kernels.reference import BLOCK, Widths, bundles_of, most_coefficients

_SOURCE = Path(__file__).with_suffix(".c")
_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "fma")
_FLAGS = ("-O3", "-shared", "-fPIC", "-std=gnu11", "-fopenmp", *(f"-m{feature}" for feature in _FEATURES))
_LIBRARIES = ("-nostdlib", "-lm", "-lc", "-lgcc")  # threads are those of PyTorch's OpenMP, which is loaded already


@cache
def available() -> bool:
    """Whether processor and compiler are there; the first call builds the library."""
    has = binding.get_host_cpu_features()
    return all(has.get(feature, False) for feature in _FEATURES) and _library() is not None


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


def attention(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    widths: tuple[tuple[Widths, ...], tuple[Widths, ...]],
    queries: Tensor,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the tokens of all storages and what it weighs, tile by tile: nothing of the past's length is made.

    `keys` and `values` [batch, blocks, bytes], their widths of as many bundles, `queries` [batch, bundles, rows, most],
    `extra` [batch, bundles, rows, tokens] added to logits. Returns the largest logit and the sum of weights relative to
    it [batch, bundles, rows], and the weighed sums [batch, bundles, rows, most of values], float32.
    """
    q, threads = queries.float().contiguous(), torch.get_num_threads()
    batch, bundles, rows = q.shape[:3]
    items, most = batch * bundles, most_coefficients(widths[1])
    more = None if extra is None else extra.float().contiguous()
    parts = -(-threads // items)  # of every storage, where there are fewer bundles than threads
    tops = torch.full((parts, batch, bundles, rows), -torch.inf)
    totals, found = torch.zeros(tops.shape), torch.zeros(*tops.shape, most)
    before = 0
    for storage in zip(keys, values, strict=True):
        codes, blocks = [_described(x, w) for x, w in zip(storage, widths, strict=True)], storage[0].shape[1]
        at = 0 if more is None else more.data_ptr() + 4 * BLOCK * before
        distance = 0 if more is None else more.shape[-1]
        _call("packed_attention", *codes, blocks, parts, items, bundles, rows, q, at, distance, tops, totals, found, threads)
        before += blocks
    top = tops.amax(0)
    shares = (tops - top).nan_to_num_(0).exp_()
    return top, (totals * shares).sum(0), (found * shares[..., None]).sum(0)


class _Codes(ctypes.Structure):
    """As in C."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("bundles", ctypes.c_void_p),
        ("most", ctypes.c_int64),
    ]


def _described(packed: Tensor, widths: tuple[Widths, ...]) -> _Codes:
    if packed.stride(2) != 1:
        raise ValueError("bytes of a block that do not lie side by side")
    return _Codes(packed.data_ptr(), *packed.stride()[:2], bundles_of(widths).data_ptr(), most_coefficients(widths))


def _of_items(name: str, packed: Tensor, widths: tuple[Widths, ...], given: Tensor, found: Tensor) -> None:
    batch, bundles, rows = given.shape[:3]
    codes = _described(packed, widths)
    _call(name, codes, packed.shape[1], batch * bundles, bundles, rows, given, found, torch.get_num_threads())


def _call(name: str, *given: Tensor | _Codes | int) -> None:
    """A tensor goes as its address."""
    library = _library()
    assert library is not None
    numbers = (x.data_ptr() if isinstance(x, Tensor) else x for x in given)
    if library[name](*(ctypes.byref(x) if isinstance(x, _Codes) else ctypes.c_int64(x) for x in numbers)):
        raise MemoryError(f"{name}: no memory for a thread's working space")


@cache
def _library() -> ctypes.CDLL | None:
    """Built if need be; None without a compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    name = f"packed-{sha256(_SOURCE.read_bytes() + ' '.join(_FLAGS + _LIBRARIES).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eigencache"
    try:
        if not (folder / name).exists():
            if compiler is None:
                return None
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as own:  # others may be building the same
                built = Path(own) / name
                subprocess.run([compiler, *_FLAGS, "-o", built, _SOURCE, *_LIBRARIES], check=True, capture_output=True)
                built.replace(folder / name)
        return ctypes.CDLL(str(folder / name))
    except (OSError, subprocess.CalledProcessError):
        return None
