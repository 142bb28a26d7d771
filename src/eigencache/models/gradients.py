"""Gradients of the loss with respect to the cached vectors: one backward pass, without gradients of weights (THEORY 4.4)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel

from eigencache.models.capture import tapped_cache


def cache_gradients(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return ∂(Σ NLL in nats)/∂(cached vector) for every cached vector, including the effect through later layers.

    The weights keep their `requires_grad`. Cost: a forward pass with logits and a backward pass through activations. A
    model loaded in inference mode also needs a copy of its weights, because autograd does not save inference tensors.

    Args:
        model: The model.
        input_ids: Token ids [batch, seq].
        attention_mask: 1 for tokens and 0 for padding on the right [batch, seq]; default: no padding.

    Returns:
        Gradients of both slots by layer, each [batch, heads, seq, dim].
    """
    copies = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_inference()}
    with _frozen(model), torch.enable_grad():
        cache, stored = tapped_cache(model, track=True)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": cache, "use_cache": True}
        logits = (functional_call(model, copies, kwargs=given) if copies else model(**given)).logits
        targets = (
            input_ids[:, 1:] if attention_mask is None else input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
        )
        F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum").backward()
        zero = lambda x: torch.zeros_like(x) if x.grad is None else x.grad  # noqa: E731 - nothing reads the vector
        return {layer_idx: (zero(keys), zero(values)) for layer_idx, (keys, values) in stored.items()}


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    flags = [(weight, weight.requires_grad) for weight in model.parameters() if not weight.is_inference()]
    try:
        for weight, _ in flags:
            weight.requires_grad_(False)
        yield
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)
