"""The live cache: a transformers cache whose past is bit-packed and is never unpacked to be attended to.

`CompressedCache` goes where a `DynamicCache` goes; `compressed_context.py` makes it the model's own for a whole program.
"""

import copy
import logging
from os import PathLike
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from eigencache.codec.base import storage_bytes
from eigencache.codec.live.codec import LiveCodec
from eigencache.errors import CodecError, UnsupportedArchitectureError
from eigencache.kernels.packed.backend import BackendName, packed_backend
from eigencache.models.caches.keyword import innermost
from eigencache.models.caches.tensors import tensors_of
from eigencache.models.devices import device_of
from eigencache.models.live_cache.attention import require_compressed_attention
from eigencache.models.live_cache.layer import CompressedLayer
from eigencache.models.live_cache.passes import watch
from eigencache.models.rope_detection import steady_tokens

_LOG = logging.getLogger(__name__)


class CompressedCache(DynamicCache):
    """`model.generate(**inputs, past_key_values=CompressedCache(model, codec))`: the past bit-packed, for any decoding.

    In passes with this cache the model's attention goes through this package, in others through its own. A pass that breaks
    off, for memory or for NaN, leaves a cache that holds what it held before: packed tokens may come back as unpacked.
    Where the text grows beyond what the codec was fitted for, one warning says so.

    `model`: a transformers model, or one inside of PEFT or `torch.compile`. `codec`: a `LiveCodec`, or what
    `eigencache.fit(..., live=True)` gives. `backend`: what reads packed blocks; None: the fastest.
    Raises `UnsupportedArchitectureError` for a model whose keys and values are held in another way, or its attention
    called, and `CodecError` for the codec of another model and for a backend that cannot be used.
    """

    def __init__(self, model: Any, codec: Any, *, backend: BackendName | None = None) -> None:
        model = innermost(model)
        super().__init__(config=model.config)
        if hasattr(codec, "require_model"):  # a `CacheCodec`, which knows its model
            codec.require_model(model)
        self.codec = codec = live_codec(codec)
        if shared := [module.layer_idx for module in model.modules() if getattr(module, "is_kv_shared_layer", False)]:
            raise UnsupportedArchitectureError(
                f"{model.config.model_type}: layers {shared} attend to what other layers cache: a live cache holds keys and "
                "values, or MLA latents, for the layer they come from"
            )
        found, self._owner = {}, object()
        self._backend: BackendName | None = backend
        for layer_idx, layer in enumerate(self.layers):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                if hasattr(layer, "update"):
                    raise UnsupportedArchitectureError(
                        f"{model.config.model_type}: layer {layer_idx} keeps a {type(layer).__name__}: a live cache holds "
                        "keys and values, or MLA latents"
                    )
                continue
            if layer_idx in codec.layers:
                window = getattr(layer, "sliding_window", None)
                found[layer_idx] = CompressedLayer(
                    layer_idx, codec.layers[layer_idx], codec.sinks, codec.window, window, backend=backend, owner=self._owner
                )
        if other := sorted(codec.layers.keys() - found.keys()):
            raise CodecError(f"layers {other}: the model caches none there, this codec was fitted on another model")
        for layer_idx, layer in found.items():
            self.layers[layer_idx] = layer
        for layer in [layer for layer in found.values() if layer.turns][1:]:
            layer.watches_positions = False  # they are those of the first
        require_compressed_attention(model)
        self._device = device_of(model)
        self.backend  # noqa: B018 - compiled, looked at or refused now, not in the middle of a text
        self._pass: tuple[nn.Module, list[int]] | None = None  # whose it is, and tokens of compressed layers before it
        self._model, self._far = ref(model), _far(model, codec)
        watch(model, self)

    @property
    def backend(self) -> BackendName:
        """What reads packed blocks for a few queries (`kernels/packed/backend.py`)."""
        return packed_backend(torch.empty(0, device=self._device), 1, self._backend).name

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompressedCache":
        """A cache of its own with the same tokens; the codec, which is held once, is shared."""
        memo[id(self.codec)] = self.codec
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        copied._owner, model = object(), self._model()
        for layer in copied.compressed_layers:
            layer.owner = copied._owner
        if model is not None:
            watch(model, copied)
        return copied

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that are held packed."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that exist because of the cache; what the codec holds once is apart."""
        return storage_bytes(t for _, t in self._tensors())

    def ledger(self) -> dict[str, int]:
        """What the bytes are: sinks, packed keys and values, window, empty room for blocks, states of other layers."""
        found = {"sinks": 0, "keys": 0, "values": 0, "window": 0, "empty": 0, "states": 0}
        for name, tensor in self._tensors():
            found[name] += tensor.untyped_storage().nbytes()
        for layer in self.compressed_layers:
            for chunk in layer.chunks:
                for name, x in (("keys", chunk.keys), ("values", chunk.values)):
                    empty = x.nbytes // x.shape[1] * (x.shape[1] - chunk.filled)
                    found[name] -= empty
                    found["empty"] += empty
        return found

    def begin_pass(self, module: nn.Module) -> None:
        """A pass through `module` begins, or through a part of it. One before that was interrupted is undone."""
        if self._pass is None or self._pass[0] is module:
            self.end_pass(module, failed=True)
            self._pass = module, [layer.get_seq_length() for layer in self.compressed_layers]

    def end_pass(self, module: nn.Module, failed: bool) -> None:
        """It ends; where it failed, layers forget what they have taken from it."""
        if self._pass is None or self._pass[0] is not module:
            return
        for layer, length in zip(self.compressed_layers, self._pass[1], strict=True) if failed else ():
            layer.crop(min(0, length - layer.get_seq_length()))
        self._pass = None
        if not failed:
            self._warn_of_length()
        if unread := [layer for layer in self.compressed_layers if layer.entered]:
            raise CodecError(
                f"layer {unread[0].layer_idx}: its attention did not read the compressed cache: the model's attention was "
                "replaced in the middle of a pass"
            )

    def _warn_of_length(self) -> None:
        """Say once what begins where the text has become longer than the codec was fitted for."""
        length = next((layer.get_seq_length() for layer in self.compressed_layers), 0)  # all see the same tokens
        for reach, why in [one for one in self._far.items() if one[0] < length]:
            del self._far[reach]
            _LOG.warning("the live cache holds %d tokens: %s", length, why)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        found = [(name, t) for layer in self.compressed_layers for name, ts in layer.tensors().items() for t in ts]
        others = [layer for layer in self.layers if not isinstance(layer, CompressedLayer)]
        return found + [("states", t) for layer in others for held in vars(layer).values() for t in tensors_of(held)]


def live_codec(codec: Any) -> LiveCodec:
    """The `LiveCodec` itself or in what holds one as `live`. Raises `CodecError` where there is none."""
    if isinstance(codec, str | PathLike):
        raise CodecError(
            f"{codec}: a live cache takes a codec, not its folder: give CacheCodec.load(folder, model, tokenizer)"
        )
    found = getattr(codec, "live", codec)
    if not isinstance(found, LiveCodec):
        raise CodecError("this codec has no part for a live cache: fit it with `--live` (fit(..., live=True) in Python)")
    return found


def _far(model: PreTrainedModel, codec: LiveCodec) -> dict[int, str]:
    """Tokens beyond which the codec was not fitted → what that means."""
    found, steady = {}, steady_tokens(model.config)
    if codec.reach is not None:
        found[codec.reach] = (
            f"the codec was fitted for {codec.reach} positions, and may lose more behind them than stated: fit one with a "
            "larger `max_length`, or `reach` of its live settings"
        )
    if steady is not None:
        found[steady] = (
            f"in texts of more than {steady} the model rotates keys with frequencies that the codec was not fitted for, and "
            "it may lose more than it states"
        )
    return found
