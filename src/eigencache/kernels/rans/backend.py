"""The choice of the backend that decodes entropy-coded blocks: one given by name, or the fastest available one.

`cpu`: numba. `triton`: for GPUs. A named backend is used or refused with a reason; it is never replaced.
"""

import logging
from functools import cache
from importlib.util import find_spec
from os import environ
from typing import Literal, get_args

import torch

from eigencache.errors import CodecError

Backend = Literal["cpu", "triton"]
_LOG = logging.getLogger(__name__)


def choose_backend(backend: Backend | None, device: torch.device) -> Backend:
    """Return the backend that decodes blocks.

    Args:
        backend: backend to use; None chooses `triton` on a CUDA device with the package triton, else `cpu`.
        device: device of the codec, to which the integers are decoded.

    Raises:
        CodecError: the named backend does not exist or cannot be used on the device.
    """
    if backend is None:
        if device.type != "cuda":
            return "cpu"
        if (reason := unavailable(device).get("triton")) is None:
            return "triton"
        _warn_once(f"backend triton cannot be used; the CPU decodes entropy-coded blocks: {reason}")
        return "cpu"
    if backend not in get_args(Backend):
        raise CodecError(f"`backend` {backend!r} does not exist: use one of {', '.join(get_args(Backend))}")
    if (reason := unavailable(device).get(backend)) is not None:
        raise CodecError(f"`backend` {backend!r} cannot be used: {reason}")
    return backend


def unavailable(device: torch.device) -> dict[Backend, str]:
    """Return why backends cannot be used on a device, by name; backends that can be used are missing."""
    if find_spec("triton") is None:
        return {"triton": "the package triton is not installed: pip install 'eigencache[triton]'"}
    if device.type != "cuda" and environ.get("TRITON_INTERPRET") != "1":
        return {"triton": f"it needs a cuda device, the codec is on {device}: move it with codec.to('cuda')"}
    return {}


@cache
def _warn_once(message: str) -> None:
    _LOG.warning(message)
