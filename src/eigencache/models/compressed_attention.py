"""Attention over the live cache: what transformers calls when a layer's cache is compressed, else what it called before.

Logits of sinks, blocks and window stand side by side, so that masks, soft caps and attention sinks mean what they mean in
the model; blocks are read by `kernels/`. MLA is attended in the latent: W_UK goes into the queries, W_UV after the sums, so
that the past is never expanded (THEORY 8, 9).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from eigencache.errors import UnsupportedArchitectureError
from eigencache.kernels.packed import logits_of, sums_of
from eigencache.kernels.reference import BLOCK
from eigencache.models.compressed_layer import CompressedLayer, updated

NAME = "eigencache"
_LOGITS = 2**26  # at a time: more queries wait


def use_compressed_attention(model: PreTrainedModel) -> None:
    """Let the model attend through this module. Raises `UnsupportedArchitectureError` where it cannot."""
    if model.config._attn_implementation == NAME:
        return
    if model.config.is_encoder_decoder:
        raise UnsupportedArchitectureError(f"{model.config.model_type}: encoder and decoder: a live cache serves decoders")
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UnsupportedArchitectureError(
            f"{model.config.model_type}: its attention cannot be replaced (it does not use transformers' AttentionInterface)"
        )


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a layer calls: `query` [batch, heads, seq, dim], `key` and `value` of the window with the new tokens."""
    layer = updated.get()
    updated.set(None)
    if layer is None or layer.layer_idx != getattr(module, "layer_idx", None) or key.shape[2] != layer.window_count:
        if layer is not None:
            layer.entered = 0
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, **kwargs)
    if layer.first is None:
        layer.first = _first_tokens(attention_mask, len(query))
    if layer.blocks or layer.sinks or softcap is not None or s_aux is not None:
        out = _over_all(module, layer, query, key, value, attention_mask, scaling, softcap, s_aux)
    else:
        out = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0]
    layer.compact()
    return out, None


def _first_tokens(mask: Tensor | None, batch: int) -> Tensor:
    """How many slots are padding at the left of every row [batch]."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64)
    seen = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0].any(1)
    return seen.int().argmax(-1).cpu().expand(batch).clone()


def _over_all(
    module: nn.Module,
    layer: CompressedLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """[batch, seq, heads, dim of values] in the query's dtype: all queries, as many at a time as logits fit."""
    parts = Latent(module, layer) if hasattr(module, "kv_b_proj") else Heads(layer)
    total = layer.sink_count + BLOCK * layer.blocks + key.shape[2]
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], total, dtype=torch.bool, device=query.device).tril(total - query.shape[2])[
            None, None
        ]
    step = max(1, _LOGITS // (query.shape[0] * query.shape[1] * total))
    found = []
    for at in range(0, query.shape[2], step):
        q = query[:, :, at : at + step].float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        logits = torch.cat([parts.sink_logits(q), parts.block_logits(q), _products(q, key)], -1)
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        if mask is not None:
            own = mask[:, :, at : at + step, -total:]
            logits = logits.masked_fill(~own, -torch.inf) if mask.dtype == torch.bool else logits + own
        weights = _softmax(logits, s_aux)
        sinks, blocks, window = weights.split([layer.sink_count, BLOCK * layer.blocks, key.shape[2]], -1)
        found.append(parts.sink_sums(sinks) + parts.block_sums(blocks) + _sums(window, value))
    return torch.cat(found, 2).transpose(1, 2).to(query.dtype)


def _softmax(logits: Tensor, s_aux: Tensor | None) -> Tensor:
    """Over tokens; `s_aux` [heads] are logits that take weight and give nothing. A row that sees nothing gets zeros."""
    if s_aux is None:
        return logits.softmax(-1).nan_to_num_()
    extra = s_aux.float().view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, extra], -1).softmax(-1)[..., :-1]


class Heads:
    """Keys and values of heads: sinks as they are, blocks by coefficients."""

    def __init__(self, layer: CompressedLayer) -> None:
        self.layer = layer

    def sink_logits(self, q: Tensor) -> Tensor:
        """[batch, query heads, seq, sinks]."""
        return q[..., :0] if self.layer.sinks is None else _products(q, self.layer.sinks[0])

    def sink_sums(self, weights: Tensor) -> Tensor | float:
        """[batch, query heads, seq, dim]."""
        return 0.0 if self.layer.sinks is None else _sums(weights, self.layer.sinks[1])

    def block_logits(self, q: Tensor) -> Tensor:
        """[batch, query heads, seq, tokens of all blocks]."""
        return block_logits(self.layer, 0, q)

    def block_sums(self, weights: Tensor) -> Tensor:
        """[batch, query heads, seq, dim]."""
        return block_sums(self.layer, 1, weights)


class Latent:
    """MLA: one latent and one rotary key for all heads, `keys` and `values` of the cache; W_UK and W_UV are absorbed."""

    def __init__(self, module: nn.Module, layer: CompressedLayer) -> None:
        self.layer = layer
        self.nope = module.qk_nope_head_dim
        weight = module.kv_b_proj.weight.unflatten(0, (-1, self.nope + module.v_head_dim)).float()  # type: ignore[union-attr, operator]
        self.up_keys, self.up_values = weight.split([self.nope, module.v_head_dim], 1)  # type: ignore[list-item]

    def sink_logits(self, q: Tensor) -> Tensor:
        """As `Heads`."""
        if self.layer.sinks is None:
            return q[..., :0]
        latent, rotary = self.layer.sinks
        return _products(self._absorbed(q), latent) + _products(q[..., self.nope :], rotary)

    def sink_sums(self, weights: Tensor) -> Tensor | float:
        """As `Heads`."""
        return 0.0 if self.layer.sinks is None else self._expanded(_sums(weights, self.layer.sinks[0]))

    def block_logits(self, q: Tensor) -> Tensor:
        """As `Heads`."""
        return block_logits(self.layer, 0, self._absorbed(q)) + block_logits(self.layer, 1, q[..., self.nope :])

    def block_sums(self, weights: Tensor) -> Tensor:
        """As `Heads`."""
        return self._expanded(block_sums(self.layer, 0, weights))

    def _absorbed(self, q: Tensor) -> Tensor:
        return torch.einsum("bhsd,hdr->bhsr", q[..., : self.nope], self.up_keys)

    def _expanded(self, latents: Tensor) -> Tensor:
        return torch.einsum("bhsr,hvr->bhsv", latents, self.up_values)


def block_logits(layer: CompressedLayer, slot: int, q: Tensor) -> Tensor:
    """q · k̂ [batch, query heads, seq, tokens] of what is packed in a slot, keys' means and their turning included."""
    heads = layer.heads[slot]
    rows = q.unflatten(1, (len(heads.mean), -1)).flatten(2, 3)  # queries of a KV head beside each other
    packed = [chunk.slot(slot) for chunk in layer.chunks]
    if not packed:
        return q[..., :0]
    projected = heads.queries(rows)
    found = torch.cat([logits_of(x, heads.widths, projected) for x in packed], -1)
    found = found.unflatten(2, (-1, rows.shape[2])).flatten(1, 2)  # bundles apart again
    found += (rows * heads.mean[:, None]).sum(-1, keepdim=True)
    if heads.turning is not None:
        found += heads.turning.logits(rows, layer.starts(0, layer.blocks).to(q.device))
    return found.unflatten(2, (-1, q.shape[2])).flatten(1, 2)


def block_sums(layer: CompressedLayer, slot: int, weights: Tensor) -> Tensor:
    """Σ a x̂ [batch, query heads, seq, dim] of what is packed in a slot."""
    heads = layer.heads[slot]
    rows = weights.unflatten(1, (len(heads.mean), -1)).flatten(2, 3)
    bundled = rows.unflatten(1, (len(heads.widths), -1)).flatten(2, 3)
    total, at = 0, 0
    for chunk in layer.chunks:
        stop = at + BLOCK * chunk.filled
        total = total + sums_of(chunk.slot(slot), heads.widths, bundled[..., at:stop])
        at = stop
    found = heads.mean[:, None] * rows.sum(-1, keepdim=True)
    if layer.chunks:
        found = found + heads.expanded(total)  # type: ignore[arg-type]
    return found.unflatten(2, (-1, weights.shape[2])).flatten(1, 2)


def _products(q: Tensor, keys: Tensor) -> Tensor:
    """q · k [batch, query heads, seq, tokens] float32 of fewer KV heads."""
    rows = q.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    return (rows @ keys.float().mT).unflatten(2, (-1, q.shape[2])).flatten(1, 2)


def _sums(weights: Tensor, values: Tensor) -> Tensor:
    """Σ a v [batch, query heads, seq, dim] float32."""
    rows = weights.unflatten(1, (values.shape[1], -1)).flatten(2, 3)
    return (rows @ values.float()).unflatten(2, (-1, weights.shape[2])).flatten(1, 2)
