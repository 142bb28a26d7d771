"""Caches that forget tokens: a press of the package kvpress decides which keys and values of a prefix are left.

The package scores and evicts as it is, at its own settings but for the ratio: the prefix is read with its hooks, each layer
evicting after it has attended to everything. What is left is held in 16 bits, and what follows stands where it stands in
the text, behind the whole prefix, as in the package's own pipeline.

* kvpress 0.5.2 wants `cache_position`, which transformers no longer hands on by itself: it is given with the prefix.
* Importing kvpress changes every attention function of transformers, for presses that evict per head: undone here.
* A prefix that is not longer than what a press keeps in any case, SnapKV's 64 last tokens, is kept whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache as once
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eigencache.codec.base import storage_bytes, to_sixteen_bit
from eigencache.errors import CodecError

Press = Literal["knorm", "snapkv", "expected-attention"]
_CLASSES = {"knorm": "KnormPress", "snapkv": "SnapKVPress", "expected-attention": "ExpectedAttentionPress"}
_ALWAYS_KEPT = {"knorm": "", "snapkv": "window_size", "expected-attention": "n_sink"}


@dataclass(frozen=True)
class Evicted:
    """Makes a cache of a prefix that has lost the share `ratio` of its tokens, other ones in every layer and head."""

    press: Press
    ratio: float
    nbytes: int = 0

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.press} {self.ratio:g}"

    @torch.no_grad()
    def cache_of(self, prefix: Any) -> Cache:
        """A new cache of what is left, in 16 bits; the prefix is read again to find what that is."""
        model, length = prefix.loaded.model, prefix.ids.shape[1]
        press = getattr(_kvpress(), _CLASSES[self.press])(compression_ratio=self.ratio)
        read = DynamicCache(config=model.config)
        if not length:
            return read
        positions = torch.arange(length, device=prefix.ids.device)
        with _pressed(press, model) if length > getattr(press, _ALWAYS_KEPT[self.press], 0) else nullcontext():
            model.base_model(input_ids=prefix.ids, past_key_values=read, use_cache=True, cache_position=positions)
        return Cache(layers=[_EvictedLayer(*_halved(layer, i), length) for i, layer in enumerate(read.layers)])

    def held(self, cache: Cache) -> tuple[int, int]:
        """Tokens of all rows that were read, and bytes of what is left of them."""
        layers: list[Any] = cache.layers
        if not cache.get_seq_length():
            return 0, 0
        left = [x for layer in layers for x in (layer.keys, layer.values)]
        return cache.get_seq_length() * len(left[0]), storage_bytes(left)


class _EvictedLayer(DynamicLayer):
    """Some of the tokens that were read; what follows has the positions and the mask that it has behind all of them."""

    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor, read: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.evicted = keys, values, read - keys.shape[-2]

    def get_seq_length(self) -> int:
        """Tokens read so far, evicted ones included."""
        return self.evicted + self.keys.shape[-2]  # type: ignore[union-attr]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of what `update` returns, and its offset: as if the first tokens were the evicted ones."""
        return self.keys.shape[-2] + query_length, self.evicted  # type: ignore[union-attr]

    def crop(self, tokens_to_remove: int) -> None:
        """Raises `CodecError`: what was evicted cannot be had back."""
        raise CodecError("a cache with evicted tokens cannot be cropped: use a decoding strategy that never goes back")


def refusal(model: PreTrainedModel) -> str | None:
    """Why a model cannot have presses here, if it cannot."""
    if find_spec("kvpress") is None:
        return "the package kvpress is not installed: install 'eigencache[peers]'"
    try:
        supported = [one for one in _kvpress().SUPPORTED_MODELS if "ForCausalLM" in one.__name__]
    except CodecError as error:
        return str(error)
    if not isinstance(model, tuple(supported)):
        return f"kvpress works on {', '.join(one.__name__.removesuffix('ForCausalLM') for one in supported)}"
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return "some of its layers forget tokens by themselves"
    return None


@once
def _kvpress() -> Any:
    """The package, without what its import does to attention functions. Raises `CodecError` where it cannot be had."""
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        import kvpress  # type: ignore[import-not-found]
    except ImportError as error:
        raise CodecError(f"kvpress cannot be imported: {error}; install 'eigencache[peers]'") from error
    finally:
        for name, function in before.items():
            if ALL_ATTENTION_FUNCTIONS[name] is not function:
                del ALL_ATTENTION_FUNCTIONS[name]  # what was laid over it, and over all that is registered later
    return kvpress


@contextmanager
def _pressed(press: Any, model: Any) -> Iterator[None]:
    """The press on the model, which it leaves as it was: kvpress hangs the model's rotation into every attention module."""
    attentions = [layer.self_attn for layer in model.model.layers]
    before = [dict(attention._modules) for attention in attentions]
    try:
        with press(model):
            yield
    finally:
        for attention, modules in zip(attentions, before, strict=True):
            attention._modules = modules


def _halved(layer: Any, layer_idx: int) -> tuple[Tensor, Tensor]:
    keys, values = (to_sixteen_bit(x, f"layer {layer_idx}") for x in (layer.keys, layer.values))
    return keys, values
