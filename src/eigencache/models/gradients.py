"""Gradients of the loss with respect to the cached vectors: one backward pass, without gradients of weights (THEORY 4.4).

Logits are the largest tensors of a small model. They are therefore made for a few positions at a time, from the hidden
states of one pass through the base model.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel

from eigencache.memory import LOGITS
from eigencache.models.caches.keyword import innermost
from eigencache.models.tapped_cache import tapped_cache


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
    work = _Backward(innermost(model))
    copies = {name: t.clone() for name, t in (*work.named_parameters(), *work.named_buffers()) if t.is_inference()}
    with _frozen(work.model), torch.enable_grad():
        stored = functional_call(work, copies, (input_ids, attention_mask))
    zero = lambda x: torch.zeros_like(x) if x.grad is None else x.grad  # noqa: E731 - nothing reads the vector
    return {layer_idx: (zero(keys), zero(values)) for layer_idx, (keys, values) in stored.items()}


class _Backward(nn.Module):
    """Runs a model forward and backward; a module, so that `functional_call` can replace its weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict[int, tuple[Tensor, Tensor]]:
        """Return keys and values of every layer, with their gradients."""
        model: Any = self.model
        cache, stored = tapped_cache(model, track=True)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": cache, "use_cache": True}
        targets = input_ids[:, 1:] if attention_mask is None else _unpadded(input_ids, attention_mask)
        base = model.base_model
        if base is model or "logits_to_keep" not in inspect.signature(model.forward).parameters:
            _loss(model(**given).logits[:, :-1], targets).backward()
            return stored
        output = base(**given)
        hidden = output.last_hidden_state
        leaf = hidden.detach().requires_grad_()
        step = max(1, LOGITS // (len(input_ids) * model.config.get_text_config().vocab_size))
        with _returning(base, output, leaf):
            for start in range(0, targets.shape[1], step):
                chunk = slice(start, min(start + step, targets.shape[1]))
                _loss(model(input_ids=input_ids, logits_to_keep=chunk).logits, targets[:, chunk]).backward()
        hidden.backward(leaf.grad)
        return stored


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return Σ NLL in nats of logits [batch, seq, vocabulary]; targets of −100 do not count."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def _unpadded(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the targets [batch, seq − 1], with −100 in place of padding."""
    return input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)


@contextmanager
def _returning(base: nn.Module, output: Any, hidden: Tensor) -> Iterator[None]:
    """Let the base model return `output` with the last hidden state `hidden`, so that only the head of the model runs."""
    replaced = copy.copy(output)
    replaced.last_hidden_state = hidden
    before = vars(base).get("forward")
    base.forward = lambda *_, **__: replaced
    try:
        yield
    finally:
        if before is None:
            del base.forward
        else:
            base.forward = before


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
