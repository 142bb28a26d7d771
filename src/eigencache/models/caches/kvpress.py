"""Caches with evicted tokens: a press of the package kvpress decides which keys and values of a prefix stay.

The package scores and evicts unchanged, at its own settings except for the ratio. The prefix is read with the package's
hooks, and each layer evicts after it has attended to everything. The rest is stored in 16 bits. Tokens that follow keep the
positions that they have after the whole prefix, as in the package's own pipeline.

* kvpress 0.5.2 needs `cache_position`, which transformers no longer passes on, so it is given with the prefix.
* Importing kvpress wraps every attention function of transformers, for presses that evict per head. This is undone here.
* A prefix no longer than what a press always keeps, such as SnapKV's 64 last tokens, is stored whole.
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
    """Maker of a cache from a prefix with evicted tokens, which differ between layers and heads.

    Attributes:
        press: Eviction method.
        ratio: Share of tokens that is evicted, from 0 to 1.
        nbytes: Bytes of the side information; there is none.
    """

    press: Press
    ratio: float
    nbytes: int = 0

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"{self.press} {self.ratio:g}"

    @torch.no_grad()
    def cache_of(self, prefix: Any) -> Cache:
        """Return a new cache of the tokens that stay, in 16 bits; reads the prefix again to select them."""
        model, length = prefix.loaded.model, prefix.ids.shape[1]
        press = getattr(_kvpress(), _CLASSES[self.press])(compression_ratio=self.ratio)
        read = DynamicCache(config=model.config)
        if not length:
            return read
        positions = torch.arange(length, device=prefix.ids.device)
        with _pressed(press, model) if length > getattr(press, _ALWAYS_KEPT[self.press], 0) else nullcontext():
            model.base_model(input_ids=prefix.ids, past_key_values=read, use_cache=True, cache_position=positions)
        return Cache(layers=[_EvictedLayer(*_sixteen_bit(layer, i), length) for i, layer in enumerate(read.layers)])

    def held(self, cache: Cache) -> tuple[int, int]:
        """Return the tokens of all rows that were read, and the bytes of those that stay."""
        layers: list[Any] = cache.layers
        if not cache.get_seq_length():
            return 0, 0
        left = [x for layer in layers for x in (layer.keys, layer.values)]
        return cache.get_seq_length() * len(left[0]), storage_bytes(left)


class _EvictedLayer(DynamicLayer):
    """Layer without some of the tokens that were read; positions and masks count the evicted ones."""

    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor, read: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.evicted = keys, values, read - keys.shape[-2]

    def get_seq_length(self) -> int:
        """Return the number of tokens read, evicted ones included."""
        return self.evicted + self.keys.shape[-2]  # type: ignore[union-attr]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of what `update` returns, as if the first tokens were the evicted ones."""
        return self.keys.shape[-2] + query_length, self.evicted  # type: ignore[union-attr]

    def crop(self, tokens_to_remove: int) -> None:
        """Raise `CodecError`: evicted tokens are lost."""
        raise CodecError("a cache with evicted tokens cannot be cropped: use a decoding strategy that never removes tokens")


def refusal(model: PreTrainedModel) -> str | None:
    """Return why presses cannot be used with `model` on this machine; None if they can."""
    if find_spec("kvpress") is None:
        return "the package kvpress is not installed: install 'eigencache[peers]'"
    try:
        supported = [kind for kind in _kvpress().SUPPORTED_MODELS if "ForCausalLM" in kind.__name__]
    except CodecError as error:
        return str(error)
    if not isinstance(model, tuple(supported)):
        return f"kvpress works on {', '.join(kind.__name__.removesuffix('ForCausalLM') for kind in supported)}"
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return "some of its layers drop tokens by themselves"
    return None


@once
def _kvpress() -> Any:
    """Import the package and undo its change of attention functions. Raises `CodecError` if the import fails."""
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        import kvpress  # type: ignore[import-not-found]
    except ImportError as error:
        raise CodecError(f"kvpress cannot be imported: {error}; install 'eigencache[peers]'") from error
    finally:
        for name, function in before.items():
            if ALL_ATTENTION_FUNCTIONS[name] is not function:
                del ALL_ATTENTION_FUNCTIONS[name]  # removes the wrapper, which would also hide later registrations
    return kvpress


@contextmanager
def _pressed(press: Any, model: Any) -> Iterator[None]:
    """Apply the press inside, and remove the rotation that kvpress adds to every attention module afterwards."""
    attentions = [layer.self_attn for layer in model.model.layers]
    before = [dict(attention._modules) for attention in attentions]
    try:
        with press(model):
            yield
    finally:
        for attention, modules in zip(attentions, before, strict=True):
            attention._modules = modules


def _sixteen_bit(layer: Any, layer_idx: int) -> tuple[Tensor, Tensor]:
    keys, values = (to_sixteen_bit(x, f"layer {layer_idx}") for x in (layer.keys, layer.values))
    return keys, values
