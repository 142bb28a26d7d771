"""The attention weights of a forward pass, as the model computes them, for a few queries at a time.

In the passes of a `with` block, the model calls the attention function of this file instead of its own. It receives
queries and keys after rotation and normalization, with the model's scaling, soft cap, mask (causal, windows, padding) and
sink logits, so no architecture needs code of its own. The model's attention is restored when the block ends.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

NAME = "eigencache_weights"  # of the attention implementation in transformers
_LOGITS = 2**22  # logits computed at a time, 16 MiB in float32; further queries wait


@dataclass(frozen=True)
class AttentionWeights:
    """Attention weights of a few queries of one layer.

    Attributes:
        layer_idx: Layer.
        start: Position of the first of the queries.
        kv_heads: Heads of the keys. Consecutive query heads share one.
        weights: Attention weights [batch, query heads, queries, keys] float32. They may be changed in place.
        visible: Whether the mask lets a query attend to a key [batch or 1, heads or 1, queries, keys].
    """

    layer_idx: int
    start: int
    kv_heads: int
    weights: Tensor
    visible: Tensor


Listener = Callable[[AttentionWeights], None]
_listener: ContextVar[Listener | None] = ContextVar("attention_weights", default=None)


@contextmanager
def attention_weights(model: PreTrainedModel, listen: Listener) -> Iterator[None]:
    """Pass the attention weights of all forward passes inside the `with` block to `listen`, chunk after chunk.

    The passes must begin with an empty cache. A layer whose attention does not use transformers' `AttentionInterface` runs
    unchanged and is not heard.

    Args:
        model: The model; its attention implementation is switched, and switched back at the end.
        listen: Called once per layer and chunk of queries.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # boolean, and none for causal attention without padding
    configs = list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())
    before = [config._attn_implementation for config in configs]
    token = _listener.set(listen)
    try:
        if model._can_set_attn_implementation():
            for config in configs:
                config._attn_implementation_internal = NAME
        yield
    finally:
        _listener.reset(token)
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as the model does, and tell the listener the weights.

    Args:
        module: The model's attention module.
        query: [batch, query heads, seq, dim].
        key: [batch, KV heads, seq, dim].
        value: [batch, KV heads, seq, dim of values].
        attention_mask: Mask [batch or 1, heads or 1, seq, seq], boolean or added to logits; None for causal attention.
        scaling: Factor of the logits; None for 1 / √dim.
        softcap: Soft cap of logits; None for none.
        s_aux: Logits [heads] that take weight and add no value; None for none.
        indices: Keys that an indexer selected for each query [batch, seq, selected]; None for all.

    Returns:
        [batch, seq, query heads, dim of values] in the dtype of `query`, and None.
    """
    listen, layer_idx = _listener.get(), getattr(module, "layer_idx", None)
    batch, heads, seq, dim = query.shape
    tokens = key.shape[2]
    step, outputs = max(1, _LOGITS // (batch * heads * tokens)), []
    for start in range(0, seq, step):
        rows = slice(start, min(start + step, seq))
        logits = _grouped(query[:, :, rows].float() * (dim**-0.5 if scaling is None else scaling), key.float().mT)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if attention_mask is None:
            visible = torch.ones(rows.stop - start, tokens, dtype=torch.bool, device=query.device).tril(start)[None, None]
        else:
            mask = attention_mask[..., rows, :tokens]
            visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            logits = logits if mask.dtype == torch.bool else logits + mask
        if indices is not None:
            chosen = torch.zeros(batch, 1, logits.shape[2], tokens, dtype=torch.bool, device=query.device)
            visible = visible & chosen.scatter(-1, indices[:, None, rows].long(), True)
        logits = logits.masked_fill(~visible, -torch.inf)
        if s_aux is not None:
            logits = torch.cat([logits, s_aux.float().view(1, -1, 1, 1).expand(batch, -1, logits.shape[2], 1)], -1)
        weights = logits.softmax(-1)[..., :tokens].nan_to_num_(0.0)  # a query that sees nothing is padding
        outputs.append(_grouped(weights, value.float()))
        if listen is not None and isinstance(layer_idx, int):
            listen(AttentionWeights(layer_idx, start, key.shape[1], weights, visible))
    return torch.cat(outputs, 2).transpose(1, 2).to(query.dtype).contiguous(), None


def _grouped(x: Tensor, y: Tensor) -> Tensor:
    """Return x y, where x [batch, query heads, n, m] has a multiple of the heads of y [batch, KV heads, m, p]."""
    rows = x.unflatten(1, (y.shape[1], -1))
    return (rows.flatten(2, 3) @ y).unflatten(2, rows.shape[2:4]).flatten(1, 2)
