"""`CompressedCache`, a transformers cache that stores past keys and values bit-packed."""

import copy
import logging
from os import PathLike
from typing import Any
from weakref import finalize, ref

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
from eigencache.models.live_cache.hooks import base_model, enable
from eigencache.models.live_cache.layer import CompressedLayer
from eigencache.models.rope_detection import steady_tokens
from eigencache.modes import uncompiled

_LOG = logging.getLogger(__name__)


class CompressedCache(DynamicCache):
    """Drop-in replacement for `DynamicCache` that stores the past bit-packed and attends to it without unpacking.

    `model.generate(**inputs, past_key_values=CompressedCache(model, codec))` works with every decoding strategy.

    The constructor checks that codec and model fit, and calls `enable(model)`, which adds hooks to the model. They are
    removed with the model's last compressed cache. The model's attention is replaced in passes with this cache, and in no
    others. If a pass fails, the cache contains the tokens that it contained before; some of them may have been unpacked. A
    warning is logged once if the text becomes longer than the codec was fitted for.

    Args:
        model: A transformers model, or one inside PEFT or `torch.compile` wrappers.
        codec: A `LiveCodec`, or a `CacheCodec` that `eigencache.fit(..., live=True)` returned.
        backend: Backend that reads packed blocks: vnni, cpu, triton or reference; None for the fastest one. It is compiled,
            or refused, in the first pass.

    Raises:
        UnsupportedArchitectureError: The model's cache or its attention cannot be replaced.
        CodecError: The codec was fitted on another model, or has no live part.
    """

    def __init__(self, model: Any, codec: Any, *, backend: BackendName | None = None) -> None:
        model = innermost(model)
        super().__init__(config=model.config)
        if hasattr(codec, "require_model"):  # a `CacheCodec`, which knows its model
            codec.require_model(model)
        self.codec = codec = live_codec(codec)
        self._owner, self._device = object(), device_of(model)
        self._backend: BackendName | None = backend
        for layer_idx, layer in _compressed_layers(model, self.layers, codec, backend, self._owner).items():
            self.layers[layer_idx] = layer
        self._pass: tuple[nn.Module, list[int]] | None = None  # module of the current pass, and lengths of layers before it
        self._model, self._limits = ref(model), _fitted_lengths(model, codec)
        finalize(self, enable(model).close)

    @property
    def backend(self) -> BackendName:
        """Name of the backend that reads packed blocks for a few queries (`kernels/packed/backend.py`).

        Raises `CodecError` if the requested backend cannot be used; compiles it if necessary.
        """
        return packed_backend(torch.empty(0, device=self._device), 1, self._backend).name

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompressedCache":
        """Return an independent copy of the tokens; the codec is shared."""
        memo[id(self.codec)] = self.codec
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        copied._owner, model = object(), self._model()
        for layer in copied.compressed_layers:
            layer.owner = copied._owner
        if model is not None:
            finalize(copied, enable(model).close)
        return copied

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers with packed blocks."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that exist because of the cache, without the codec's side information."""
        return storage_bytes(t for _, t in self._tensors())

    def ledger(self) -> dict[str, int]:
        """Return the bytes by purpose: sinks, packed keys, packed values, window, spare room, states of other layers."""
        nbytes = {"sinks": 0, "keys": 0, "values": 0, "window": 0, "empty": 0, "states": 0}
        for name, tensor in self._tensors():
            nbytes[name] += tensor.untyped_storage().nbytes()
        for layer in self.compressed_layers:
            for chunk in layer.chunks:
                for name, x in (("keys", chunk.keys), ("values", chunk.values)):
                    empty = x.nbytes // x.shape[1] * (x.shape[1] - chunk.filled)
                    nbytes[name] -= empty
                    nbytes["empty"] += empty
        return nbytes

    def belongs_to(self, module: nn.Module) -> bool:
        """Return whether the cache was made for the model `module`, or for one with the same base model."""
        model = self._model()
        return model is not None and base_model(model) is base_model(module)

    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Add new tokens to a layer; called by the model's attention, in a pass that the hooks of `enable` began.

        Args:
            key_states: Keys of the new tokens [batch, KV heads, new, dim].
            value_states: Values of the new tokens, same shape but for `dim`.
            layer_idx: Index of the layer.
            *args: As in `transformers.Cache.update`.
            **kwargs: As in `transformers.Cache.update`.

        Returns:
            The layer's keys and values, for a compressed layer those of the window.

        Raises:
            CodecError: No pass has begun: the model has no hooks.
        """
        if self._pass is None and isinstance(self.layers[layer_idx], CompressedLayer):
            raise CodecError(
                f"layer {layer_idx}: the model cannot read the compressed cache, which was made for another model or whose "
                "model was disabled: make a CompressedCache for this model, or call `enable(model)`"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def begin_pass(self, module: nn.Module) -> None:
        """Note that a pass through `module` begins; called by the hooks of `enable`.

        An interrupted pass before it is undone first. A call for a module inside the current pass does nothing.

        Args:
            module: The model, or its base model.

        Raises:
            CodecError: The requested backend cannot be used.
        """
        if self._pass is None or self._pass[0] is module:
            self.end_pass(module, failed=True)
            self.backend  # noqa: B018 - compiles the backend, or refuses it, before the pass stores anything
            self._pass = module, [layer.length for layer in self.compressed_layers]

    def end_pass(self, module: nn.Module, failed: bool) -> None:
        """Note that a pass through `module` ends; called by the hooks of `enable`.

        Args:
            module: The module that `begin_pass` was called with.
            failed: Whether the pass raised an error; then the tokens that it added are removed.

        Raises:
            CodecError: The attention of a layer did not read the cache.
        """
        if self._pass is None or self._pass[0] is not module:
            return
        for layer, length in zip(self.compressed_layers, self._pass[1], strict=True) if failed else ():
            layer.crop(min(0, length - layer.length))
        self._pass = None
        if not failed:
            self._warn_of_length()
        if unread := [layer for layer in self.compressed_layers if layer.entered]:
            raise CodecError(
                f"layer {unread[0].layer_idx}: attention did not read the compressed cache, because the model's attention "
                "was replaced during the pass: do not change the attention implementation there"
            )

    def _warn_of_length(self) -> None:
        """Log each limit of the codec once, when the text has become longer."""
        length = next((layer.length for layer in self.compressed_layers), 0)  # equal in all layers
        for limit, consequence in [entry for entry in self._limits.items() if entry[0] < length]:
            del self._limits[limit]
            _LOG.warning("the compressed cache contains %d tokens: %s", length, consequence)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        """Return all tensors with their purpose."""
        tensors = [(name, t) for layer in self.compressed_layers for name, ts in layer.tensors().items() for t in ts]
        others = [layer for layer in self.layers if not isinstance(layer, CompressedLayer)]
        return tensors + [("states", t) for layer in others for state in vars(layer).values() for t in tensors_of(state)]


def live_codec(codec: Any) -> LiveCodec:
    """Return `codec` itself if it is a `LiveCodec`, else its attribute `live`.

    Raises:
        CodecError: There is no live codec.
    """
    if isinstance(codec, str | PathLike):
        raise CodecError(f"`codec` is the path {codec}, not a codec: load it with CacheCodec.load(folder, model, tokenizer)")
    live = getattr(codec, "live", codec)
    if not isinstance(live, LiveCodec):
        raise CodecError(
            f"`codec` is of {type(codec).__name__} and has no live codec: give what "
            "eigencache.fit(…, live=True) returned or CacheCodec.load read"
        )
    return live


def _compressed_layers(
    model: PreTrainedModel, layers: list[Any], codec: LiveCodec, backend: BackendName | None, owner: object
) -> dict[int, CompressedLayer]:
    """Return layer index → new compressed layer, and raise the errors of `CompressedCache`."""
    kind = model.config.model_type
    if shared := [module.layer_idx for module in model.modules() if getattr(module, "is_kv_shared_layer", False)]:
        raise UnsupportedArchitectureError(
            f"{kind}: layers {shared} attend to the keys and values of other layers, which CompressedCache does not "
            "support: use a DynamicCache"
        )
    compressed: dict[int, CompressedLayer] = {}
    for layer_idx, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            if hasattr(layer, "update"):
                raise UnsupportedArchitectureError(
                    f"{kind}: layer {layer_idx} has a {type(layer).__name__}, but CompressedCache supports keys and values, "
                    "or MLA latents: use a DynamicCache"
                )
            continue
        if layer_idx in codec.layers:
            compressed[layer_idx] = CompressedLayer(
                layer_idx,
                codec.layers[layer_idx],
                codec.sinks,
                codec.window,
                getattr(layer, "sliding_window", None),
                backend=backend,
                owner=owner,
            )
    if other := sorted(codec.layers.keys() - compressed.keys()):
        raise CodecError(
            f"the codec has layers {other}, in which the model has no cache. It was fitted on another model: "
            "fit one on this model"
        )
    for layer in [layer for layer in compressed.values() if layer.has_rotated_mean][1:]:
        layer.watches_positions = False  # the first layer checks them for all
    return compressed


def _fitted_lengths(model: PreTrainedModel, codec: LiveCodec) -> dict[int, str]:
    """Return number of tokens → warning for longer texts, for each limit of the fit."""
    limits, steady = {}, steady_tokens(model.config)
    if codec.reach is not None:
        limits[codec.reach] = (
            f"the codec was fitted for {codec.reach} positions, and its loss may exceed the reported one beyond them: fit a "
            "codec with a larger `max_length`, or a larger `reach` in its live settings"
        )
    if steady is not None:
        limits[steady] = (
            f"in texts of more than {steady} tokens the model rotates keys with frequencies that the codec was not fitted "
            "for, and its loss may exceed the reported one"
        )
    return limits
