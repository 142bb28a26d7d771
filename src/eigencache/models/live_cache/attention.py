"""The attention function that transformers calls in passes with a compressed cache.

Attention over sinks, packed blocks and window is merged exactly, so that masks, soft caps and attention sinks have the
meaning that they have in the model. `segments.py` computes attention over each of the three.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from eigencache.errors import UnsupportedArchitectureError
from eigencache.models.live_cache.block_attention import PartialAttention
from eigencache.models.live_cache.layer import CompressedLayer
from eigencache.models.live_cache.pending import pending
from eigencache.models.live_cache.segments import Latent, Segment, has_past, segments_of
from eigencache.modes import own_modes, uncompiled

NAME = "eigencache"  # of the attention implementation in transformers
_LOGITS = 2**26  # maximum number of logits computed at a time; further queries wait


def require_compressed_attention(model: PreTrainedModel) -> None:
    """Register the attention function, and check that `model` can use it; the model is left unchanged.

    Raises:
        UnsupportedArchitectureError: The model's attention cannot be replaced.
    """
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise UnsupportedArchitectureError(
            f"{kind}: encoder-decoder models are not supported by CompressedCache: use a DynamicCache"
        )
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    configs = list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())
    before = [config._attn_implementation for config in configs]
    model.set_attn_implementation(NAME)
    replaced = model.config._attn_implementation == NAME
    for config, implementation in zip(configs, before, strict=True):
        config._attn_implementation_internal = implementation
    for module in model.modules():
        if hasattr(module, "kv_b_proj"):
            Latent(module, module.kv_lora_rank)  # type: ignore[arg-type] # raises now rather than in a pass
    if not replaced:
        raise UnsupportedArchitectureError(
            f"{kind}: its attention cannot be replaced, because it does not use transformers' AttentionInterface: use a "
            "DynamicCache"
        )


@uncompiled
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
    """Attend to a compressed layer and pack what has left its window; without one, attend as the model does.

    Args:
        module: The model's attention module.
        query: [batch, query heads, seq, dim].
        key: Keys of the window with the new tokens [batch, KV heads, tokens, dim].
        value: Values of the window with the new tokens.
        attention_mask: Mask of all slots [batch or 1, heads or 1, seq, slots]; None for causal attention.
        scaling: Factor of the logits; None for 1 / √dim.
        softcap: Soft cap of logits.
        s_aux: Logits of attention sinks [heads].
        **kwargs: Further arguments of transformers' attention functions.
    """
    layer = pending.take(module, key)
    if layer is not None:
        layer.place(_no_padding(attention_mask, query.shape[2]), kwargs.get("position_ids"))
    if softcap is None and s_aux is None and (layer is None or not has_past(layer)):
        out = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0]
    else:
        with own_modes():
            out = attend(module, layer, query, key, value, attention_mask, scaling, softcap, s_aux)
    if layer is not None:
        with own_modes():
            layer.compact()
    return out, None


def _no_padding(mask: Tensor | None, new: int) -> Tensor | None:
    """Return whether each new token is no padding [batch or 1, new], that is, attends to itself; None for all."""
    if mask is None:
        return None
    diagonal = mask[:, 0, :, -new:].diagonal(dim1=-2, dim2=-1)
    return diagonal if diagonal.dtype == torch.bool else diagonal >= 0


def attend(
    module: nn.Module,
    layer: CompressedLayer | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attend to the sinks and packed blocks of a layer and to its window.

    Queries are processed in groups, so that no more than 2^26 logits exist at a time.

    Args:
        module: The model's attention module.
        layer: The compressed layer; None to attend to `key` and `value` alone.
        query: [batch, query heads, seq, dim].
        key: Keys of the window with the new tokens [batch, KV heads, tokens, dim].
        value: Values of the window with the new tokens.
        mask: Mask of all slots [batch or 1, heads or 1, seq, slots], boolean or added to logits; None for causal attention.
        scaling: Factor of the logits; None for 1 / √dim.
        softcap: Soft cap of logits; None for none.
        s_aux: Logits [heads] that take weight and add no value; None for none.

    Returns:
        [batch, seq, query heads, dim of values] in the dtype of `query`.
    """
    segments, new = segments_of(module, layer, key, value), query.shape[2]
    total = key.shape[2] if layer is None else layer.length - layer.dropped
    if mask is None and (new > 1 or (layer is not None and layer.padded)):
        mask = torch.ones(1, 1, new, total, dtype=torch.bool, device=query.device).tril(total - new)
    step = max(1, _LOGITS // (query.shape[0] * query.shape[1] * total))
    outputs = []
    for start in range(0, query.shape[2], step):
        q = query[:, :, start : start + step].float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        masks = _masks(None if mask is None else mask[:, :, start : start + step, -total:], layer, segments)
        partials = [segment.attention(q, part, softcap) for segment, part in zip(segments, masks, strict=True)]
        outputs.append(_merged(partials, s_aux))
    return torch.cat(outputs, 2).transpose(1, 2).to(query.dtype)


def _masks(mask: Tensor | None, layer: CompressedLayer | None, segments: Sequence[Segment]) -> Sequence[Tensor | None]:
    """Split a mask of all slots into one per segment; with padding, sinks lie at other slots and are hidden there."""
    if mask is None:
        return [None] * len(segments)
    if layer is None or layer.sinks is None or not layer.padded:
        return mask.split([segment.tokens for segment in segments], -1)
    of_sinks, mask = layer.sinks.split(mask, layer.dropped)
    return of_sinks, *mask[..., layer.led :].split([segment.tokens for segment in segments[1:]], -1)


def _merged(partials: Sequence[PartialAttention], s_aux: Tensor | None) -> Tensor:
    """Merge attention over segments to [batch, query heads, seq, dim of values]; zeros for queries that see no token."""
    tops = [partial.top for partial in partials]
    if s_aux is not None:
        tops.append(s_aux.detach().float().view(1, -1, 1, 1))
    most = reduce(torch.maximum, tops)
    shares = [(partial.top - most).exp_() for partial in partials]
    total = sum(partial.total * share for partial, share in zip(partials, shares, strict=True))
    if s_aux is not None:
        total = total + (s_aux.float().view(1, -1, 1, 1) - most).exp()
    sums = sum(partial.sums * share for partial, share in zip(partials, shares, strict=True))
    return sums / total.clamp_min(torch.finfo(torch.float32).tiny)  # type: ignore[union-attr]
