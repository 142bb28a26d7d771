"""The name of the cache argument: `past_key_values` before transformers 5.24, which ignores `cache`; either one since."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from eigencache.errors import UnsupportedArchitectureError

KEYWORDS = ("cache", "past_key_values")  # the first wins if both are given, as in transformers


def cache_keyword(forward: Callable[..., Any]) -> str:
    """Return the name of the parameter of `forward` that takes a cache."""
    parameters = inspect.signature(forward).parameters
    return next((keyword for keyword in KEYWORDS if keyword in parameters), KEYWORDS[-1])


def cache_given(named: Mapping[str, Any]) -> Any | None:
    """Return the cache among named arguments; None if there is none."""
    return next((cache for keyword in KEYWORDS if (cache := named.get(keyword)) is not None), None)


def cache_returned(output: Any) -> Any | None:
    """Return the cache in the output of a model; None if there is none."""
    for keyword in KEYWORDS:
        if keyword in output if isinstance(output, Mapping) else hasattr(output, keyword):
            return output[keyword] if isinstance(output, Mapping) else getattr(output, keyword)
    parts = output if isinstance(output, tuple) else ()
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)


def innermost(model: Any) -> PreTrainedModel:
    """Return the transformers model inside `torch.compile` and PEFT wrappers.

    Raises:
        UnsupportedArchitectureError: The model uses prefix or prompt tuning, which puts a cache or tokens of its own before
            the text, or there is no transformers model inside.
    """
    while not isinstance(model, PreTrainedModel):
        adapters = getattr(model, "peft_config", None) or {}
        if any(getattr(config, "is_prompt_learning", False) for config in adapters.values()):
            raise UnsupportedArchitectureError(
                "prefix and prompt tuning put keys and values of their own before the text, which is not supported: "
                "use a plain cache"
            )
        inner = getattr(model, "_orig_mod", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if not isinstance(inner, nn.Module):
            raise UnsupportedArchitectureError(
                f"`model` is of type {type(model).__name__}, which neither is nor contains a transformers model: pass a "
                "PreTrainedModel"
            )
        model = inner
    return model
