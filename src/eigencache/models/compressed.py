"""The live cache: a transformers cache whose past is bit-packed and is never unpacked to be attended to.

`CompressedCache` goes where a `DynamicCache` goes; `compressed` makes it the model's own for a whole program.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from eigencache.codec.base import storage_bytes
from eigencache.codec.live import LiveCodec
from eigencache.errors import CodecError, UnsupportedArchitectureError
from eigencache.models.compressed_attention import use_compressed_attention
from eigencache.models.compressed_layer import CompressedLayer


class CompressedCache(DynamicCache):
    """`model.generate(**inputs, past_key_values=CompressedCache(model, codec))`: the past bit-packed, for any decoding.

    The model's attention goes through this package from then on; other caches are served as before. Raises
    `UnsupportedArchitectureError` for a model that holds anything but keys and values (or MLA latents) per token, and
    `CodecError` for the codec of another model. `codec`: a `LiveCodec`, or what `eigencache.fit(..., live=True)` gives.
    """

    def __init__(self, model: PreTrainedModel, codec: Any) -> None:
        super().__init__(config=model.config)
        self.codec = codec = live_codec(codec)
        found = {}
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
                found[layer_idx] = CompressedLayer(layer_idx, codec.layers[layer_idx], codec.sinks, codec.window, window)
        if other := sorted(codec.layers.keys() - found.keys()):
            raise CodecError(f"layers {other}: the model caches none there, this codec was fitted on another model")
        for layer_idx, layer in found.items():
            self.layers[layer_idx] = layer
        use_compressed_attention(model)

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that are held packed."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that exist because of the cache; what the codec holds once is apart."""
        return storage_bytes(t for _, t in self._tensors())

    def ledger(self) -> dict[str, int]:
        """What the bytes are: sinks, packed keys, packed values, window, and empty room in storages of blocks."""
        found = {"sinks": 0, "keys": 0, "values": 0, "window": 0, "empty": 0}
        for name, tensor in self._tensors():
            found[name] += tensor.untyped_storage().nbytes()
        for layer in self.compressed_layers:
            for chunk in layer.chunks:
                for name, x in (("keys", chunk.keys), ("values", chunk.values)):
                    empty = x.nbytes // x.shape[1] * (x.shape[1] - chunk.filled)
                    found[name] -= empty
                    found["empty"] += empty
        return found

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, t) for layer in self.compressed_layers for name, ts in layer.tensors().items() for t in ts]


def live_codec(codec: Any) -> LiveCodec:
    """The `LiveCodec` itself or in what holds one as `live`. Raises `CodecError` where there is none."""
    found = getattr(codec, "live", codec)
    if not isinstance(found, LiveCodec):
        raise CodecError("this codec has no part for a live cache: fit it with `--live` (fit(..., live=True) in Python)")
    return found


@contextmanager
def compressed(model: PreTrainedModel, codec: Any) -> Iterator[PreTrainedModel]:
    """Inside, `model.generate(...)` and `model(..., use_cache=True)` without a cache of one's own make compressed ones.

    Afterwards the model is as it was, whatever happened. Raises what `CompressedCache` raises, before anything else.
    """
    before, generate = model.config._attn_implementation, model.generate

    def with_cache(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if given.get("past_key_values") is None and given.get("use_cache", model.config.use_cache):
            given["past_key_values"] = CompressedCache(model, codec)
        return args, given

    def generate_with_cache(*args: Any, **given: Any) -> Any:
        if given.get("past_key_values") is None and given.get("use_cache", True):
            given["past_key_values"] = CompressedCache(model, codec)
        return generate(*args, **given)  # type: ignore[operator]

    hook = None
    try:
        CompressedCache(model, codec)
        hook = model.register_forward_pre_hook(with_cache, with_kwargs=True)
        model.generate = generate_with_cache  # type: ignore[method-assign]
        yield model
    finally:
        if hook is not None:
            hook.remove()
        model.__dict__.pop("generate", None)
        model.set_attn_implementation(before or "eager")
