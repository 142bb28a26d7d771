"""Which backend decodes is chosen aloud: one asked for by name is used or refused, never replaced by another."""

from importlib.util import find_spec
from os import environ
from typing import Literal, get_args

import torch

from eigencache.errors import CodecError

Backend = Literal["cpu", "triton"]


def chosen(backend: Backend | None, device: torch.device) -> Backend:
    """`backend` itself; for None "triton" where tensors are on a CUDA device and Triton is installed, else "cpu".

    Raises `CodecError` for a backend that there is not, and for Triton where it is not installed or has no GPU.
    """
    installed, gpu = find_spec("triton") is not None, device.type == "cuda"
    if backend is None:
        return "triton" if gpu and installed else "cpu"
    if backend not in get_args(Backend):
        raise CodecError(f"no backend {backend!r}: there are {' and '.join(get_args(Backend))}")
    if backend == "triton" and not installed:
        raise CodecError("backend triton is not installed: pip install 'eigencache[triton]'")
    if backend == "triton" and not gpu and environ.get("TRITON_INTERPRET") != "1":
        raise CodecError(f"backend triton decodes on a GPU and the codec is on {device}: move it with codec.to('cuda')")
    return backend
