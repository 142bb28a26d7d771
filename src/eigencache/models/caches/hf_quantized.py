"""The quantized cache of transformers, filled with a prefix, and the bytes that it occupies.

`transformers.QuantizedCache` with the packages optimum-quanto and HQQ does all the work. It runs at its defaults (groups of
64 numbers, 128 tokens of residual) except for the bit width and the axis. It quantizes a prefill as a whole, so the residual
is empty right after a prefix, and it quantizes everything again whenever 128 further tokens have arrived.

* The prefix is given in 16 bits, as 16-bit models give it. Scales and zeros then take 16 bits each, 0.5 bits per number.
* The extension that optimum-quanto would compile for unpacking is replaced by the same shifts and masks in PyTorch.
* HQQ's default axis 0 groups numbers that are far apart, also across the rows of a batch, so that a row depends slightly on
  the others. Axis 1, which the documentation of transformers advises for HQQ, does not, nor does quanto.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, QuantizedCache
from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

from eigencache.codec.base import storage_bytes, to_sixteen_bit
from eigencache.errors import CodecError
from eigencache.models.caches.tensors import tensors_of

Backend = Literal["quanto", "hqq"]
_AVAILABLE = {"quanto": is_optimum_quanto_available, "hqq": is_hqq_available}
_PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}


@dataclass(frozen=True)
class Quantized:
    """Maker of a `transformers.QuantizedCache` from a prefix.

    Attributes:
        backend: Package that quantizes.
        bits: Bit width of keys and of values.
        axis: Axis along which numbers are grouped, 0 or 1.
        nbytes: Bytes of the side information; there is none.
    """

    backend: Backend
    bits: int
    axis: int = 0
    nbytes: int = 0

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"{self.backend} {self.bits} bits, axis {self.axis}"

    def cache_of(self, prefix: Any) -> QuantizedCache:
        """Return a new cache that received the prefix as a prefill.

        Raises:
            CodecError: The package refuses to quantize a layer.
        """
        if self.backend == "quanto":
            unpack_without_compiler()
        cache = QuantizedCache(
            self.backend, prefix.loaded.model.config, nbits=self.bits, axis_key=self.axis, axis_value=self.axis
        )
        for layer_idx, slots in prefix.stored.items():
            keys, values = (to_sixteen_bit(x, f"layer {layer_idx}") for x in slots)
            try:
                cache.update(keys, values, layer_idx)
            except (AssertionError, ValueError) as error:
                raise CodecError(f"{self.name}: layer {layer_idx} cannot be quantized: {error}") from error
        return cache

    def held(self, cache: QuantizedCache) -> tuple[int, int]:
        """Return the tokens of all rows, and the bytes of their codes, scales, zeros and residual."""
        layers: list[Any] = cache.layers
        if not cache.get_seq_length():
            return 0, 0
        rows = len(layers[0]._dequantize(layers[0]._quantized_keys))
        return cache.get_seq_length() * rows, storage_bytes(t for layer in layers for t in tensors_of(vars(layer)))


def refusal(backend: Backend, model: PreTrainedModel) -> str | None:
    """Return why the quantized cache cannot be used with `model` on this machine; None if it can."""
    if not _AVAILABLE[backend]():
        return f"the package {_PACKAGES[backend]} is not installed: install 'eigencache[peers]'"
    try:
        QuantizedCache(backend, model.config)
    except (ImportError, ValueError) as error:
        return str(error)
    return None


def unpack_without_compiler() -> None:
    """Let optimum-quanto unpack with PyTorch unless its extension is loaded: compiling it takes minutes, or hangs."""
    from optimum.quanto.library.extensions import get_extension  # type: ignore[import-not-found]

    extension = get_extension("quanto_cpp")
    extension._lib = extension._lib or SimpleNamespace(unpack=unpacked)


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Unpack 2-bit or 4-bit codes from bytes; the lowest bits of all bytes come first."""
    return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])
