"""How a version of transformers names a cache: `past_key_values` before 5.24, `cache` since; the old keyword still goes."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from eigencache.errors import UnsupportedArchitectureError

KEYWORDS = ("cache", "past_key_values")  # of both, the first wins, as it does in transformers


def cache_keyword(forward: Callable[..., Any]) -> str:
    """The name of the parameter that takes a cache."""
    parameters = inspect.signature(forward).parameters
    return next((keyword for keyword in KEYWORDS if keyword in parameters), KEYWORDS[-1])


def cache_given(named: Mapping[str, Any]) -> Any | None:
    """The cache among arguments by name; None where there is none."""
    return next((found for keyword in KEYWORDS if (found := named.get(keyword)) is not None), None)


def cache_returned(output: Any) -> Any | None:
    """The cache in what a model returned; None where there is none."""
    for keyword in KEYWORDS:
        if keyword in output if isinstance(output, Mapping) else hasattr(output, keyword):
            return output[keyword] if isinstance(output, Mapping) else getattr(output, keyword)
    parts = output if isinstance(output, tuple) else ()
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)


def innermost(model: Any) -> PreTrainedModel:
    """The transformers model inside of `torch.compile` and PEFT.

    Raises `UnsupportedArchitectureError` for prefix and prompt tuning, which put a cache or tokens of their own before the
    text, and for what is no transformers model.
    """
    while not isinstance(model, PreTrainedModel):
        adapters = getattr(model, "peft_config", None) or {}
        if any(getattr(config, "is_prompt_learning", False) for config in adapters.values()):
            raise UnsupportedArchitectureError(
                "prefix and prompt tuning put keys and values of their own before the text: use a plain cache"
            )
        inner = getattr(model, "_orig_mod", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if not isinstance(inner, nn.Module):
            raise UnsupportedArchitectureError(f"{type(model).__name__} is no transformers model, and none is inside of it")
        model = inner
    return model
