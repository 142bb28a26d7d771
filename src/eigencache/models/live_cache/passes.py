"""Passes through a model with a live cache: attention reads the cache in them, and in no others.

Hooks on the model see a `CompressedCache` among the arguments of a pass. They switch attention to
`compressed_attention.py` for this pass alone, tell the cache where it begins and ends, and are removed with the model's last
live cache. Other caches are served by the attention that the model was loaded with.
"""

import functools
from collections.abc import Mapping
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, finalize

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from eigencache.errors import CodecError
from eigencache.models.caches.keyword import KEYWORDS
from eigencache.models.live_cache.attention import NAME
from eigencache.modes import uncompiled


class _Watch:
    """The hooks of one model, the caches that need them, and the pass that is under way."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.caches: WeakSet[Any] = WeakSet()
        self.configs = list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())
        self.inside: list[nn.Module] = []  # modules whose pass has begun, the outermost first
        self.before: list[str | None] = []  # the attention of each configuration
        self.handles: list[RemovableHandle] = []
        for module in dict.fromkeys((model, model.base_model)):
            self.handles.append(module.register_forward_pre_hook(_begins, with_kwargs=True))
            self.handles.append(module.register_forward_hook(_ends, with_kwargs=True, always_call=True))
        self.follows = "prepare_inputs_for_generation" not in vars(model)
        if self.follows and hasattr(model, "prepare_inputs_for_generation"):
            prepare = functools.wraps(_own_prepare(model))(_prepared)
            model.prepare_inputs_for_generation = MethodType(prepare, model)  # type: ignore[method-assign]

    def remove(self, model: PreTrainedModel) -> None:
        """The model is as it was."""
        for handle in self.handles:
            handle.remove()
        if self.follows:
            vars(model).pop("prepare_inputs_for_generation", None)

    def begin(self, module: nn.Module) -> None:
        """Attention reads live caches from here on."""
        if not self.inside:
            self.before = [config._attn_implementation for config in self.configs]
            for config in self.configs:
                config._attn_implementation_internal = NAME
        self.inside.append(module)

    def end(self, module: nn.Module) -> None:
        """After the outermost module attention is again what it was."""
        while self.inside and self.inside.pop() is not module:
            pass
        if not self.inside:
            for config, before in zip(self.configs, self.before, strict=True):
                config._attn_implementation_internal = before


_WATCHED: WeakKeyDictionary[nn.Module, _Watch] = WeakKeyDictionary()  # by model and by its base model


def watch(model: PreTrainedModel, cache: Any) -> None:
    """Let `cache` know where passes through `model` begin and end, as long as the cache lives."""
    if model not in _WATCHED:
        _WATCHED[model] = _WATCHED[model.base_model] = _Watch(model)
    _WATCHED[model].caches.add(cache)
    finalize(cache, _forget, _WATCHED[model], model)


def _forget(watched: _Watch, model: PreTrainedModel) -> None:
    if not list(watched.caches) and _WATCHED.get(model) is watched:
        watched.remove(model)
        for module in {model, model.base_model}:
            del _WATCHED[module]


def _caches_in(args: tuple[Any, ...], given: Mapping[str, Any]) -> list[Any]:
    """The live caches among arguments."""
    return [x for x in (*args, *given.values()) if hasattr(x, "begin_pass")]


@uncompiled
def _begins(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    caches = _caches_in(args, given)
    if not caches:
        return
    watched = _WATCHED.get(module)
    if watched is None or any(cache not in watched.caches for cache in caches):
        raise CodecError("this compressed cache was made for another model: make a CompressedCache for this one")
    if given.get("output_attentions"):
        raise CodecError("output_attentions=True: a compressed cache gives no attention weights: use a plain cache")
    watched.begin(module)
    for cache in caches:
        cache.begin_pass(module)


@uncompiled
def _ends(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
    watched = _WATCHED.get(module)
    if watched is None or module not in watched.inside:
        return
    watched.end(module)
    for cache in _caches_in(args, given):
        cache.end_pass(module, failed=output is None)


def _prepared(self: PreTrainedModel, *args: Any, **given: Any) -> dict[str, Any]:
    """Where a model drops its cache to read the whole text again, it reads it into the same cache, emptied.

    Phi-3 does at the length at which its rotation changes (longrope).
    """
    inputs = _own_prepare(self)(self, *args, **given)
    caches = _caches_in(args, given)
    if caches and all(inputs.get(keyword) is None for keyword in KEYWORDS):
        caches[0].reset()
        inputs[next((keyword for keyword in KEYWORDS if keyword in inputs), KEYWORDS[-1])] = caches[0]
    return inputs


def _own_prepare(model: PreTrainedModel) -> Any:
    return getattr(type(model), "prepare_inputs_for_generation")  # noqa: B009 - of models that generate
