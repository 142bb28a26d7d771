"""The quantized cache of transformers itself, filled with a prefix, and the bytes of the storages that it holds.

Nothing of it is rebuilt here: `transformers.QuantizedCache` with the packages optimum-quanto and HQQ does the work, at its
defaults (groups of 64, 128 tokens of residual) but for what a method names. A prefill is quantized whole, so right behind
a prefix nothing is in the residual; everything is quantized anew each time 128 further tokens are there.

* It is fed in 16 bits, as models of 16 bits feed it: scales and zeros take 16 bits each, and so 0.5 bits per number.
* The extension that optimum-quanto would compile for unpacking is replaced by the same shifts and masks in torch.
* HQQ's axis 0, the default, makes groups of numbers that lie far apart, across the rows of a batch too, so that a row
  depends a little on the others; its axis 1, which the documentation of transformers advises for HQQ, and quanto do not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, QuantizedCache
from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

from eigencache.codec.base import storage_bytes, to_sixteen_bit
from eigencache.errors import CodecError

Backend = Literal["quanto", "hqq"]
_AVAILABLE = {"quanto": is_optimum_quanto_available, "hqq": is_hqq_available}
_PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}


@dataclass(frozen=True)
class Quantized:
    """Makes a `transformers.QuantizedCache` of a prefix: keys and values at `bits`, in groups along `axis`."""

    backend: Backend
    bits: int
    axis: int = 0
    nbytes: int = 0

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.backend} {self.bits} bits, axis {self.axis}"

    def cache_of(self, prefix: Any) -> QuantizedCache:
        """A new cache that was given the prefix as a prefill gives it. Raises `CodecError` where its back end refuses."""
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
        """Tokens of all rows, and bytes of codes, scales, zeros and residual."""
        layers: list[Any] = cache.layers
        if not cache.get_seq_length():
            return 0, 0
        rows = len(layers[0]._dequantize(layers[0]._quantized_keys))
        return cache.get_seq_length() * rows, storage_bytes(t for layer in layers for t in tensors_of(vars(layer)))


def refusal(backend: Backend, model: PreTrainedModel) -> str | None:
    """Why a model cannot have the quantized cache of this back end here, if it cannot."""
    if not _AVAILABLE[backend]():
        return f"the package {_PACKAGES[backend]} is not installed: install 'eigencache[peers]'"
    try:
        QuantizedCache(backend, model.config)
    except (ImportError, ValueError) as error:
        return str(error)
    return None


def tensors_of(thing: Any) -> Iterator[Tensor]:
    """The plain tensors inside anything: dicts, lists, tuples, and tensors that are made of tensors."""
    if hasattr(thing, "__tensor_flatten__"):
        thing = [getattr(thing, name) for name in thing.__tensor_flatten__()[0]]
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from tensors_of(part)


def unpack_without_compiler() -> None:
    """Let optimum-quanto unpack codes by torch, unless its extension is loaded: compiling it takes minutes, or hangs."""
    from optimum.quanto.library.extensions import get_extension  # type: ignore[import-not-found]

    extension = get_extension("quanto_cpp")
    extension._lib = extension._lib or SimpleNamespace(unpack=unpacked)


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Codes of 2 or 4 bits out of bytes, the lowest bits of all bytes first."""
    return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])
