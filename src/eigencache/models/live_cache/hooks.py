"""`enable(model)`: hooks on a model that let its attention read compressed caches, in passes with such a cache only.

The hooks find a `CompressedCache` among the arguments of a forward pass. For this pass they switch the model's attention to
`attention.py`, and they tell the cache where the pass begins and ends. In all other passes the model uses the attention that
it was loaded with.
"""

import functools
from collections.abc import Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from eigencache.errors import CodecError
from eigencache.models.caches.keyword import KEYWORDS, innermost
from eigencache.models.live_cache.attention import NAME, require_compressed_attention
from eigencache.modes import uncompiled

if TYPE_CHECKING:
    from eigencache.models.live_cache.cache import CompressedCache


def enable(model: Any) -> "Enabled":
    """Let `model` read compressed caches: register the attention function and add hooks to the model.

    Further calls for the same model add no further hooks. `CompressedCache` and `compressed()` call this function, and their
    hooks are removed with the last cache of the model; call it yourself only to keep the hooks for longer.

    Args:
        model: A transformers model, or one inside PEFT or `torch.compile` wrappers.

    Returns:
        A handle. The hooks stay until the last handle of the model is closed; it may be used as a context manager.

    Raises:
        UnsupportedArchitectureError: The model's attention cannot be replaced.
    """
    model = innermost(model)
    hooks = _HOOKS.get(base_model(model))
    if hooks is None or model not in hooks.handles:
        require_compressed_attention(model)
    if hooks is None:
        hooks = _HOOKS[base_model(model)] = _Hooks(model)
    for module in (model, base_model(model)):
        hooks.add(module)
    return Enabled(hooks)


def disable(model: Any) -> None:
    """Remove all hooks of `enable` from `model`, whatever handles are still open.

    Later passes with compressed caches of the model fail until `enable` is called again.

    Args:
        model: A transformers model, or one inside PEFT or `torch.compile` wrappers.
    """
    if hooks := _HOOKS.get(base_model(innermost(model))):
        hooks.remove()


class Enabled:
    """Handle of `enable`: the hooks stay on the model until the last handle of the model is closed."""

    def __init__(self, hooks: "_Hooks") -> None:
        self._hooks = hooks
        hooks.open.add(self)

    def close(self) -> None:
        """Close the handle; closing it again does nothing."""
        if self in self._hooks.open:
            self._hooks.open.remove(self)
            if not self._hooks.open:
                self._hooks.remove()

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Hooks:
    """Hooks of a model and of its base model, their open handles, and the pass in progress."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.open: set[Enabled] = set()
        self.handles: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()
        self.prepared: list[ref[nn.Module]] = []  # models whose `prepare_inputs_for_generation` is replaced
        self.configs = list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())
        self.inside: list[nn.Module] = []  # modules whose pass has begun, the outermost first
        self.before: list[str | None] = []  # the attention of each configuration before the pass

    def add(self, module: nn.Module) -> None:
        """Add hooks to a module that has none."""
        if module in self.handles:
            return
        self.handles[module] = [
            module.register_forward_pre_hook(_begins, with_kwargs=True),
            module.register_forward_hook(_ends, with_kwargs=True, always_call=True),
        ]
        name = "prepare_inputs_for_generation"
        if name not in vars(module) and hasattr(module, name):
            prepare = functools.wraps(_class_prepare(module))(_prepared)
            module.prepare_inputs_for_generation = MethodType(prepare, module)  # type: ignore[method-assign]
            self.prepared.append(ref(module))

    def remove(self) -> None:
        """Remove all hooks, and switch attention back if a pass was left open."""
        if self.inside:
            self.end(self.inside[0])
        for handle in [handle for handles in self.handles.values() for handle in handles]:
            handle.remove()
        for model in filter(None, (replaced() for replaced in self.prepared)):
            vars(model).pop("prepare_inputs_for_generation", None)
        for module in list(self.handles):
            if _HOOKS.get(module) is self:
                del _HOOKS[module]
        self.open.clear()
        self.handles.clear()
        self.prepared.clear()

    def begin(self, module: nn.Module) -> None:
        """Switch attention at the beginning of the outermost pass."""
        if not self.inside:
            self.before = [config._attn_implementation for config in self.configs]
            for config in self.configs:
                config._attn_implementation_internal = NAME
        self.inside.append(module)

    def end(self, module: nn.Module) -> None:
        """Switch attention back at the end of the outermost pass."""
        while self.inside and self.inside.pop() is not module:
            pass
        if not self.inside:
            for config, before in zip(self.configs, self.before, strict=True):
                config._attn_implementation_internal = before


_HOOKS: WeakKeyDictionary[nn.Module, _Hooks] = WeakKeyDictionary()  # by base model


def base_model(module: nn.Module) -> nn.Module:
    """Return the model without its head, which a cache may be passed to as well."""
    return getattr(module, "base_model", module)


def _caches_in(args: tuple[Any, ...], given: Mapping[str, Any]) -> list["CompressedCache"]:
    return [x for x in (*args, *given.values()) if hasattr(x, "begin_pass")]


@uncompiled
def _begins(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    caches, hooks = _caches_in(args, given), _HOOKS.get(base_model(module))
    if hooks is not None and module in hooks.inside:
        hooks.end(module)  # a pass that a KeyboardInterrupt left open, after which PyTorch calls no hooks
    if not caches:
        return
    if hooks is None or not all(cache.belongs_to(module) for cache in caches):
        raise CodecError("this compressed cache was made for another model: make a CompressedCache for this model")
    if given.get("output_attentions"):
        raise CodecError("output_attentions=True: a compressed cache returns no attention weights: use a DynamicCache")
    hooks.begin(module)
    for cache in caches:
        cache.begin_pass(module)


@uncompiled
def _ends(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
    hooks = _HOOKS.get(base_model(module))
    if hooks is None or module not in hooks.inside:
        return
    hooks.end(module)
    for cache in _caches_in(args, given):
        cache.end_pass(module, failed=output is None)


def _prepared(self: PreTrainedModel, *args: Any, **given: Any) -> dict[str, Any]:
    """Reset a compressed cache that the model drops to read the whole text again, and pass it to the model again.

    Phi-3 does so at the length at which its rotation changes (longrope).
    """
    inputs = _class_prepare(self)(self, *args, **given)
    caches = _caches_in(args, given)
    if caches and all(inputs.get(keyword) is None for keyword in KEYWORDS):
        caches[0].reset()
        inputs[next((keyword for keyword in KEYWORDS if keyword in inputs), KEYWORDS[-1])] = caches[0]
    return inputs


def _class_prepare(model: nn.Module) -> Any:
    """Return `prepare_inputs_for_generation` of the model's class."""
    return getattr(type(model), "prepare_inputs_for_generation")  # noqa: B009 - only generating models have it
