"""`with compressed(model, codec):`, a context in which the model makes compressed caches instead of plain ones.

The context replaces `forward` and `generate` of the innermost model, because PEFT and `torch.compile` call those. Contexts
of one model may overlap; when the last one ends, the model is as it was before the first one began.
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
from eigencache.models.live_cache.hooks import enable
from eigencache.modes import uncompiled

Maker = Callable[[], CompressedCache]


@contextmanager
def compressed(model: Any, codec: Any, *, backend: BackendName | None = None) -> Iterator[Any]:
    """Make `model.generate(...)` and `model(..., use_cache=True)` use a new `CompressedCache` unless a cache is passed.

    When the context ends, also by an exception, the model is as it was before.

    Args:
        model: A transformers model, or one inside PEFT or `torch.compile` wrappers.
        codec: As for `CompressedCache`.
        backend: As for `CompressedCache`; compiled or refused when the context begins.

    Yields:
        `model`.

    Raises:
        UnsupportedArchitectureError: As for `CompressedCache`, when the context begins.
        CodecError: As for `CompressedCache`; also inside, from a pass that did not use the cache that was made for it, and
            from `generate` with a `cache_implementation` (static, offloaded, quantized, paged).
    """
    inner = innermost(model)

    @uncompiled
    def make() -> CompressedCache:
        return CompressedCache(inner, codec, backend=backend)

    make().backend  # noqa: B018 - raises errors now rather than in a pass, and compiles the backend
    with enable(inner):
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


class _Replaced:
    """Replacement of a model's `forward` and `generate`; `makers` has one function per context, the innermost last."""

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
                    f"{type(model).__name__} did not use the compressed cache that was made for it: pass a CompressedCache "
                    f"as {keyword}"
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
                if "use_cache" in given:
                    given["use_cache"] = True  # with None transformers reads the whole text again in each step
            return generate(*args, **given)  # type: ignore[operator]

        model.forward = torch.compiler.disable(forward_with_cache, recursive=False)  # type: ignore[method-assign]
        model.generate = generate_with_cache  # type: ignore[method-assign]

    def restore(self, model: PreTrainedModel) -> None:
        """Restore the `forward` and `generate` that the model had."""
        for name, function in self.before.items():
            if function is None:
                delattr(model, name)
            else:
                setattr(model, name, function)


_CONTEXTS: WeakKeyDictionary[nn.Module, _Replaced] = WeakKeyDictionary()


def _wants(model: PreTrainedModel, given: Mapping[str, Any]) -> bool:
    """Return whether to make a cache: none is passed, and the pass uses one."""
    used, config = given.get("use_cache"), given.get("generation_config")
    if used is None:
        used = getattr(config, "use_cache", None) if config is not None else model.config.use_cache
    return cache_given(given) is None and used is not False


def _named(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return all arguments by name, with those of `**kwargs`."""
    return bound.arguments | bound.arguments.get("kwargs", {})


def _require_no_other(model: PreTrainedModel, named: Mapping[str, Any]) -> None:
    """Raise `CodecError` if the arguments of `generate` or a generation configuration ask for another cache."""
    kind = named.get("cache_implementation")
    if "cache_implementation" not in named:
        configs = named.get("generation_config"), model.generation_config
        kind = next(
            (kind for config in configs if (kind := getattr(config, "cache_implementation", None)) is not None), None
        )
    if kind not in (None, "hybrid"):  # transformers itself ignores "hybrid"
        raise CodecError(
            f"cache_implementation={kind!r} is not supported inside compressed() or with a CompressedCache: leave it out, "
            "or generate with a plain cache outside of compressed()"
        )
