"""The live cache: a transformers cache whose past is bit-packed and is never unpacked to be attended to.

`CompressedCache` goes where a `DynamicCache` goes; `compressed` makes it the model's own for a whole program.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from eigencache.codec.base import storage_bytes
from eigencache.codec.live import LiveCodec
from eigencache.errors import CodecError, UnsupportedArchitectureError
from eigencache.kernels.packed import packed_backend
from eigencache.models.compressed_attention import NAME, use_compressed_attention
from eigencache.models.compressed_layer import CompressedLayer
from eigencache.models.quantized_cache import tensors_of

_WATCHED: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()  # models and their hooks


class CompressedCache(DynamicCache):
    """`model.generate(**inputs, past_key_values=CompressedCache(model, codec))`: the past bit-packed, for any decoding.

    The model's attention goes through this package from then on; other caches are served as before. A pass that breaks off,
    for memory or for NaN, leaves a cache that holds what it held before: packed tokens may come back as unpacked. Raises
    `UnsupportedArchitectureError` for a model whose keys and values are held in another way, or its attention called, and
    `CodecError` for the codec of another model. `codec`: a `LiveCodec`, or what `eigencache.fit(..., live=True)` gives.
    """

    def __init__(self, model: PreTrainedModel, codec: Any) -> None:
        super().__init__(config=model.config)
        self.codec = codec = live_codec(codec)
        if shared := [module.layer_idx for module in model.modules() if getattr(module, "is_kv_shared_layer", False)]:
            raise UnsupportedArchitectureError(
                f"{model.config.model_type}: layers {shared} attend to what other layers cache: a live cache holds keys and "
                "values, or MLA latents, for the layer they come from"
            )
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
        for layer in [layer for layer in found.values() if layer.turns][1:]:
            layer.watches_positions = False  # they are those of the first
        packed_backend(torch.empty(0, device=model.device), 1)  # compiled or looked at now, not in the middle of a text
        use_compressed_attention(model)
        self._pass: tuple[nn.Module, list[int]] | None = None  # whose it is, and tokens of compressed layers before it
        _watch(model)

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

    def _tensors(self) -> list[tuple[str, Tensor]]:
        found = [(name, t) for layer in self.compressed_layers for name, ts in layer.tensors().items() for t in ts]
        others = [layer for layer in self.layers if not isinstance(layer, CompressedLayer)]
        return found + [("states", t) for layer in others for held in vars(layer).values() for t in tensors_of(held)]


def _watch(model: PreTrainedModel) -> None:
    """Let caches know where passes through a model begin and end."""
    if model not in _WATCHED:
        modules = {model, model.base_model}
        begins = [module.register_forward_pre_hook(_before, with_kwargs=True) for module in modules]
        ends = [module.register_forward_hook(_after, with_kwargs=True, always_call=True) for module in modules]
        _WATCHED[model] = begins + ends


def _before(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    for cache in _caches_in(args, given):
        cache.begin_pass(module)


def _after(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
    for cache in _caches_in(args, given):
        cache.end_pass(module, failed=output is None)


def _caches_in(args: tuple[Any, ...], given: Mapping[str, Any]) -> list[CompressedCache]:
    return [x for x in (*args, *given.values()) if isinstance(x, CompressedCache)]


def live_codec(codec: Any) -> LiveCodec:
    """The `LiveCodec` itself or in what holds one as `live`. Raises `CodecError` where there is none."""
    found = getattr(codec, "live", codec)
    if not isinstance(found, LiveCodec):
        raise CodecError("this codec has no part for a live cache: fit it with `--live` (fit(..., live=True) in Python)")
    return found


def _named(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Arguments by name, those of `**kwargs` among them."""
    return bound.arguments | bound.arguments.get("kwargs", {})


def _require_no_other(model: PreTrainedModel, named: Mapping[str, Any]) -> None:
    """Raises `CodecError` where arguments of `generate` or a generation configuration ask for another cache."""
    found = named.get("cache_implementation")
    if "cache_implementation" not in named:
        configs = named.get("generation_config"), model.generation_config
        found = next((own for one in configs if (own := getattr(one, "cache_implementation", None)) is not None), None)
    if found not in (None, "hybrid"):  # which transformers itself takes for none
        raise CodecError(
            f"cache_implementation={found!r} is another cache than the compressed one, which grows by packed blocks: "
            "leave it out, or generate outside of `with eigencache.compressed(...)`"
        )


@contextmanager
def compressed(model: PreTrainedModel, codec: Any) -> Iterator[PreTrainedModel]:
    """Inside, `model.generate(...)` and `model(..., use_cache=True)` without a cache of one's own make compressed ones.

    Afterwards the model is as it was, whatever happened. Raises what `CompressedCache` raises, before anything else.
    `generate` raises `CodecError` where `cache_implementation` asks for another cache: static, offloaded, quantized, paged.
    """
    own = vars(model).get("generate")
    before, generate = model.config._attn_implementation, model.generate
    signature = inspect.signature(model.forward)

    def wanted(given: Mapping[str, Any]) -> bool:
        """Whether a cache is to be made: none is given, and one is used."""
        used, config = given.get("use_cache"), given.get("generation_config")
        if used is None:
            used = getattr(config, "use_cache", None) if config is not None else model.config.use_cache
        return given.get("past_key_values") is None and used is not False

    def with_cache(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = signature.bind_partial(*args, **given)
        if wanted(_named(bound)):
            bound.arguments["past_key_values"] = CompressedCache(model, codec)
            return bound.args, bound.kwargs
        return args, given

    @functools.wraps(generate)  # type: ignore[arg-type]
    def generate_with_cache(*args: Any, **given: Any) -> Any:
        named = _named(inspect.signature(generate).bind_partial(*args, **given))  # type: ignore[arg-type]
        makes = wanted(named)
        if makes or isinstance(named.get("past_key_values"), CompressedCache):
            _require_no_other(model, named)
        if makes:
            given["past_key_values"] = CompressedCache(model, codec)
            given |= {"use_cache": True} if "use_cache" in given else {}  # with None transformers reads all again each step
        return generate(*args, **given)  # type: ignore[operator]

    CompressedCache(model, codec)
    hook = model.register_forward_pre_hook(with_cache, with_kwargs=True)
    model.generate = generate_with_cache  # type: ignore[method-assign]
    try:
        yield model
    finally:
        hook.remove()
        if own is None:
            del model.generate
        else:
            model.generate = own  # type: ignore[method-assign]
        model.set_attn_implementation(before or "eager")
        for handle in () if before == NAME else _WATCHED.pop(model, ()):
            handle.remove()
