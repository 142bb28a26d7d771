"""Attention over the live cache: what transformers calls when a layer's cache is compressed, else what it called before.

Logits of sinks, blocks and window stand side by side, so that masks, soft caps and attention sinks mean what they mean in
the model; blocks are read by `kernels/`. MLA is attended in the latent: W_UK goes into the queries, W_UV after the sums, so
that the past is never expanded (THEORY 8, 9).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from eigencache.errors import UnsupportedArchitectureError
from eigencache.kernels.packed.format import BLOCK
from eigencache.models.linear_map import linear_map
from eigencache.models.live_cache.blocks import PartialAttention, block_attention, block_logits, block_sums
from eigencache.models.live_cache.layer import CompressedLayer, updated
from eigencache.modes import own_modes, uncompiled

NAME = "eigencache"
_LOGITS = 2**26  # at a time: more queries wait


def require_compressed_attention(model: PreTrainedModel) -> None:
    """Raises `UnsupportedArchitectureError` for a model that cannot attend through this module."""
    if model.config.is_encoder_decoder:
        raise UnsupportedArchitectureError(f"{model.config.model_type}: encoder and decoder: a live cache serves decoders")
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    configs = list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())
    before = [config._attn_implementation for config in configs]
    model.set_attn_implementation(NAME)
    taken = model.config._attn_implementation == NAME
    for config, own in zip(configs, before, strict=True):
        config._attn_implementation_internal = own
    for module in model.modules():
        if hasattr(module, "kv_b_proj"):
            Latent(module, module.kv_lora_rank)  # type: ignore[arg-type] # refused now, not in the middle of a text
    if not taken:
        raise UnsupportedArchitectureError(
            f"{model.config.model_type}: its attention cannot be replaced (it does not use transformers' AttentionInterface)"
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
    """What a layer calls: `query` [batch, heads, seq, dim], `key` and `value` of the window with the new tokens."""
    layer = updated.get()
    updated.set(None)
    if layer is not None and (layer.layer_idx != getattr(module, "layer_idx", None) or key.shape[2] != layer.window_count):
        layer = None  # its cache was updated, and another layer attends
    if layer is not None:
        layer.place(_no_padding(attention_mask, query.shape[2]), kwargs.get("position_ids"))
    if softcap is None and s_aux is None and (layer is None or not _holds_more(layer)):
        out = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0]
    else:
        with own_modes():
            out = attend(module, layer, query, key, value, attention_mask, scaling, softcap, s_aux)
    if layer is not None:
        with own_modes():
            layer.compact()
    return out, None


def _no_padding(mask: Tensor | None, new: int) -> Tensor | None:
    """Which of the new tokens see themselves, as padding does not [batch or 1, new]; None: all."""
    if mask is None:
        return None
    own = mask[:, 0, :, -new:].diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own >= 0


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
    """Attention over what `layer` holds packed and over `key` and `value`, its window with the newest tokens.

    [batch, seq, heads, dim of values] in the query's dtype; as many queries at a time as logits fit.
    """
    stretches, new = _stretches(module, layer, key, value), query.shape[2]
    total = key.shape[2] if layer is None else layer.get_seq_length() - layer.dropped
    if mask is None and (new > 1 or (layer is not None and layer.padded)):
        mask = torch.ones(1, 1, new, total, dtype=torch.bool, device=query.device).tril(total - new)
    step = max(1, _LOGITS // (query.shape[0] * query.shape[1] * total))
    found = []
    for at in range(0, query.shape[2], step):
        q = query[:, :, at : at + step].float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        own = _masks(None if mask is None else mask[:, :, at : at + step, -total:], layer, stretches)
        found.append(_merged([one.attention(q, part, softcap) for one, part in zip(stretches, own, strict=True)], s_aux))
    return torch.cat(found, 2).transpose(1, 2).to(query.dtype)


def _masks(mask: Tensor | None, layer: CompressedLayer | None, stretches: Sequence["Stretch"]) -> Sequence[Tensor | None]:
    """What of a mask over all slots belongs to each stretch. Where padding comes first, sinks are hidden at their slots."""
    if mask is None:
        return [None] * len(stretches)
    if layer is None or layer.sinks is None or not layer.padded:
        return mask.split([one.tokens for one in stretches], -1)
    own, mask = layer.sinks.split(mask, layer.dropped)
    return own, *mask[..., layer.led :].split([one.tokens for one in stretches[1:]], -1)


def _merged(partials: Sequence[PartialAttention], s_aux: Tensor | None) -> Tensor:
    """Attention over all of them [batch, query heads, seq, dim of values]. A query that sees nothing gets zeros.

    `s_aux` [heads]: logits that take weight and give nothing.
    """
    tops = [one.top for one in partials]
    if s_aux is not None:
        tops.append(s_aux.detach().float().view(1, -1, 1, 1))
    most = reduce(torch.maximum, tops)
    shares = [(one.top - most).exp_() for one in partials]
    total = sum(one.total * share for one, share in zip(partials, shares, strict=True))
    if s_aux is not None:
        total = total + (s_aux.float().view(1, -1, 1, 1) - most).exp()
    sums = sum(one.sums * share for one, share in zip(partials, shares, strict=True))
    return sums / total.clamp_min(torch.finfo(torch.float32).tiny)  # type: ignore[union-attr]


class Stretch(ABC):
    """Some of the tokens that are attended to, one after the other."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """How many."""

    @abstractmethod
    def logits(self, q: Tensor) -> Tensor:
        """[batch, query heads, seq, tokens] float32, a tensor of its own, of queries [batch, query heads, seq, dim]."""

    @abstractmethod
    def sums(self, weights: Tensor) -> Tensor:
        """[batch, query heads, seq, dim of values] float32 of weights [batch, query heads, seq, tokens]."""

    def attention(self, q: Tensor, mask: Tensor | None, softcap: float | None) -> PartialAttention:
        """Of queries [batch, query heads, seq, dim] that see of it what `mask` lets them."""
        x = self.logits(q)
        if softcap is not None:
            x = x.div_(softcap).tanh_() * softcap
        if mask is not None:
            x = _masked(x, mask)
        top = x.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
        weights = x.sub_(top).exp_()
        return PartialAttention(top, weights.sum(-1, keepdim=True), self.sums(weights))


@dataclass(frozen=True, eq=False)
class Plain(Stretch):
    """Keys and values [batch, KV heads, tokens, dim] as they are."""

    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        """As `Stretch`."""
        return self.keys.shape[2]

    def logits(self, q: Tensor) -> Tensor:
        """As `Stretch`."""
        return _products(q, self.keys)

    def sums(self, weights: Tensor) -> Tensor:
        """As `Stretch`."""
        return _sums(weights, self.values)


@dataclass(frozen=True, eq=False)
class Blocks(Stretch):
    """Keys and values of a layer's blocks, by coefficients."""

    layer: CompressedLayer

    @property
    def tokens(self) -> int:
        """As `Stretch`."""
        return BLOCK * self.layer.blocks

    def logits(self, q: Tensor) -> Tensor:
        """As `Stretch`."""
        return block_logits(self.layer, 0, q)

    def sums(self, weights: Tensor) -> Tensor:
        """As `Stretch`."""
        return block_sums(self.layer, 1, weights)

    def attention(self, q: Tensor, mask: Tensor | None, softcap: float | None) -> PartialAttention:
        """As `Stretch`; where all see a stretch, by one kernel that makes nothing of the past's length."""
        visible = None if mask is None else _limits(mask, q)
        found = block_attention(self.layer, self.queries(q), visible, softcap) if mask is None or visible else None
        return super().attention(q, mask, softcap) if found is None else replace(found, sums=self.expanded(found.sums))

    def queries(self, q: Tensor) -> tuple[Tensor, ...]:
        """Of what is in the slot of keys, and perhaps of values."""
        return (q,)

    def expanded(self, sums: Tensor) -> Tensor:
        """Values [batch, query heads, seq, dim] from what a slot's weighed sums are."""
        return sums


class Latent:
    """MLA: one latent and one rotary key for all heads, in the slots of keys and values; W_UK and W_UV are absorbed."""

    def __init__(self, module: nn.Module, rank: int) -> None:
        self.nope = module.qk_nope_head_dim
        name = f"layer {module.layer_idx}, kv_b_proj"
        weight, bias = linear_map(module.kv_b_proj, rank, name)  # type: ignore[arg-type]
        if bias is not None:
            raise UnsupportedArchitectureError(f"{name}: adds a bias, which a live cache does not serve: use a plain cache")
        heads = weight.unflatten(0, (-1, self.nope + module.v_head_dim))  # type: ignore[operator]
        self.up_keys, self.up_values = heads.split([self.nope, module.v_head_dim], 1)  # type: ignore[list-item]

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Of the latent and of the rotary key."""
        nope = q[..., : self.nope].to(self.up_keys.dtype)
        return torch.einsum("bhsd,hdr->bhsr", nope, self.up_keys).float(), q[..., self.nope :]

    def expanded(self, latents: Tensor) -> Tensor:
        """Values [batch, heads, seq, dim] of sums of latents."""
        return torch.einsum("bhsr,hvr->bhsv", latents.to(self.up_values.dtype), self.up_values).float()


@dataclass(frozen=True, eq=False)
class PlainLatents(Plain):
    """Latents and rotary keys as they are."""

    latent: Latent

    def logits(self, q: Tensor) -> Tensor:
        """As `Stretch`."""
        of_latent, of_rotary = self.latent.queries(q)
        return _products(of_latent, self.keys).add_(_products(of_rotary, self.values))

    def sums(self, weights: Tensor) -> Tensor:
        """As `Stretch`."""
        return self.latent.expanded(_sums(weights, self.keys))


@dataclass(frozen=True, eq=False)
class LatentBlocks(Blocks):
    """Latents and rotary keys of a layer's blocks, by coefficients."""

    latent: Latent

    def queries(self, q: Tensor) -> tuple[Tensor, ...]:
        """As `Blocks`."""
        return self.latent.queries(q)

    def expanded(self, sums: Tensor) -> Tensor:
        """As `Blocks`."""
        return self.latent.expanded(sums)

    def logits(self, q: Tensor) -> Tensor:
        """As `Stretch`."""
        of_latent, of_rotary = self.latent.queries(q)
        return block_logits(self.layer, 0, of_latent).add_(block_logits(self.layer, 1, of_rotary))

    def sums(self, weights: Tensor) -> Tensor:
        """As `Stretch`."""
        return self.latent.expanded(block_sums(self.layer, 0, weights))


def _holds_more(layer: CompressedLayer) -> bool:
    """Whether it holds anything beside its window."""
    return bool(layer.blocks) or layer.sinks is not None


def _stretches(module: nn.Module, layer: CompressedLayer | None, key: Tensor, value: Tensor) -> list[Stretch]:
    """Sinks and blocks, where there are any, and the window. The model has expanded MLA's window itself."""
    found: list[Stretch] = []
    latent = None
    if layer is not None and hasattr(module, "kv_b_proj") and _holds_more(layer):
        latent = Latent(module, layer.window[0].shape[-1])
    if layer is not None and layer.sinks is not None:
        sinks = layer.sinks.first(layer.wanted_sinks if layer.padded else layer.led)
        found.append(PlainLatents(*sinks, latent) if latent else Plain(*sinks))
    if layer is not None and layer.chunks:
        found.append(LatentBlocks(layer, latent) if latent else Blocks(layer))
    return [*found, Plain(key, value)]


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    """In place: −∞ where a mask of truth values is not true, or a mask of numbers added."""
    return logits.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else logits.add_(mask)


def _limits(mask: Tensor, q: Tensor) -> tuple[Tensor, Tensor] | None:
    """The first token that a query sees and the one after the last [batch, query heads, seq]; None: not all in between."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    count, first = seen.sum(-1), seen.byte().argmax(-1)
    last = seen.shape[-1] - seen.byte().flip(-1).argmax(-1)
    plainly = (count == 0) | (last - first == count)
    if mask.dtype != torch.bool:
        plainly = plainly & (seen | (mask <= torch.finfo(mask.dtype).min)).all(-1)
    return (first.expand(q.shape[:3]), (first + count).expand(q.shape[:3])) if bool(plainly.all()) else None


def _products(q: Tensor, keys: Tensor) -> Tensor:
    """q · k [batch, query heads, seq, tokens] float32 of fewer KV heads."""
    rows = q.reshape(len(q), keys.shape[1], -1, q.shape[3])
    return (rows @ keys.float().mT).view(*q.shape[:3], -1)


def _sums(weights: Tensor, values: Tensor) -> Tensor:
    """Σ a v [batch, query heads, seq, dim] float32."""
    rows = weights.reshape(len(weights), values.shape[1], -1, weights.shape[3])
    return (rows @ values.float()).view(*weights.shape[:3], -1)
