"""`with compressed(model, codec):` inside it the model makes compressed caches of its own accord.

The innermost model's `forward` and `generate` are replaced, because PEFT and `torch.compile` call those and not the model
itself. Contexts of one model may overlap; the last to end leaves the model as it was before the first began.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from eigencache.errors import CodecError
from eigencache.kernels.packed.backend import BackendName
from eigencache.models.caches.keyword import cache_given, cache_keyword, cache_returned, innermost
from eigencache.models.live_cache.cache import CompressedCache
from eigencache.modes import uncompiled

Maker = Callable[[], CompressedCache]


@contextmanager
def compressed(model: Any, codec: Any, *, backend: BackendName | None = None) -> Iterator[Any]:
    """Inside, `model.generate(...)` and `model(..., use_cache=True)` without a cache of one's own make compressed ones.

    `model`: a transformers model, or one inside of PEFT or `torch.compile`. `codec`, `backend`: as for `CompressedCache`.
    Afterwards the model is as it was, whatever happened. Raises what `CompressedCache` raises, before anything else, and
    `CodecError` where a pass did not use the cache that was made for it. `generate` raises `CodecError` where
    `cache_implementation` asks for another cache: static, offloaded, quantized, paged.
    """
    inner = innermost(model)

    @uncompiled
    def make() -> CompressedCache:
        return CompressedCache(inner, codec, backend=backend)

    first = make()  # refuses what cannot be served, and keeps hooks until the context ends
    if inner not in _CONTEXTS:
        _CONTEXTS[inner] = _Replaced(inner)
    makers = _CONTEXTS[inner].makers
    makers.append(make)
    try:
        yield model
    finally:
        makers.remove(make)
        if not makers:
            _CONTEXTS.pop(inner).restore(inner)
        del first


class _Replaced:
    """A model's own `forward` and `generate` while caches are made for it; `makers`: of the contexts that are entered."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.makers: list[Maker] = []
        self.before = {name: vars(model).get(name) for name in ("forward", "generate")}
        forward, generate = model.forward, model.generate
        keyword, signature = cache_keyword(forward), inspect.signature(forward)

        @functools.wraps(forward)
        def forward_with_cache(*args: Any, **given: Any) -> Any:
            bound = signature.bind_partial(*args, **given)
            if not _wants(model, _named(bound)):
                return forward(*args, **given)
            made = self.makers[-1]()
            bound.arguments[keyword] = made
            output = forward(*bound.args, **bound.kwargs)
            if cache_returned(output) is not made:
                raise CodecError(
                    f"{type(model).__name__} did not use the compressed cache that was made for it: hand a CompressedCache "
                    f"over as {keyword}"
                )
            return output

        @functools.wraps(generate)  # type: ignore[arg-type]
        def generate_with_cache(*args: Any, **given: Any) -> Any:
            named = _named(inspect.signature(generate).bind_partial(*args, **given))  # type: ignore[arg-type]
            makes = _wants(model, named)
            if makes or isinstance(cache_given(named), CompressedCache):
                _require_no_other(model, named)
            if makes:
                given[keyword] = self.makers[-1]()
                given |= (
                    {"use_cache": True} if "use_cache" in given else {}
                )  # with None transformers reads all anew each step
            return generate(*args, **given)  # type: ignore[operator]

        model.forward = torch.compiler.disable(forward_with_cache, recursive=False)  # type: ignore[method-assign]
        model.generate = generate_with_cache  # type: ignore[method-assign]

    def restore(self, model: PreTrainedModel) -> None:
        """The model is as it was."""
        for name, own in self.before.items():
            if own is None:
                delattr(model, name)
            else:
                setattr(model, name, own)


_CONTEXTS: WeakKeyDictionary[nn.Module, _Replaced] = WeakKeyDictionary()


def _wants(model: PreTrainedModel, given: Mapping[str, Any]) -> bool:
    """Whether a cache is to be made: none is given, and one is used."""
    used, config = given.get("use_cache"), given.get("generation_config")
    if used is None:
        used = getattr(config, "use_cache", None) if config is not None else model.config.use_cache
    return cache_given(given) is None and used is not False


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
