"""Segments of the past, and attention over each: sinks and window in 16 bits, or packed blocks, of keys or of latents.

MLA is attended to in the latent space: W_UK is applied to the queries and W_UV to the weighted sums, so that the past is
never expanded (THEORY 8, 9).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from eigencache.errors import UnsupportedArchitectureError
from eigencache.kernels.packed.format import BLOCK
from eigencache.models.linear_map import linear_map
from eigencache.models.live_cache.block_attention import PartialAttention, block_attention, block_logits, block_sums
from eigencache.models.live_cache.layer import CompressedLayer


class Segment(ABC):
    """Some consecutive tokens that queries attend to."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Number of tokens."""

    @abstractmethod
    def logits(self, q: Tensor) -> Tensor:
        """Return logits [batch, query heads, seq, tokens] float32, a new tensor; `q` is [batch, query heads, seq, dim]."""

    @abstractmethod
    def sums(self, weights: Tensor) -> Tensor:
        """Return weighted sums [batch, query heads, seq, dim of values] of weights [batch, query heads, seq, tokens]."""

    def attention(self, q: Tensor, mask: Tensor | None, softcap: float | None) -> PartialAttention:
        """Return attention over the segment.

        Args:
            q: Scaled queries [batch, query heads, seq, dim] float32.
            mask: [batch or 1, heads or 1, seq, tokens], boolean or added to logits; None if all tokens are visible.
            softcap: Soft cap of logits; None for none.
        """
        x = self.logits(q)
        if softcap is not None:
            x = x.div_(softcap).tanh_() * softcap
        if mask is not None:
            x = _masked(x, mask)
        top = x.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
        weights = x.sub_(top).exp_()
        return PartialAttention(top, weights.sum(-1, keepdim=True), self.sums(weights))


@dataclass(frozen=True, eq=False)
class Plain(Segment):
    """Keys and values [batch, KV heads, tokens, dim] that are not packed."""

    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.keys.shape[2]

    def logits(self, q: Tensor) -> Tensor:
        """Return logits of queries."""
        return _products(q, self.keys)

    def sums(self, weights: Tensor) -> Tensor:
        """Return weighted sums of values."""
        return _sums(weights, self.values)


@dataclass(frozen=True, eq=False)
class Blocks(Segment):
    """Packed blocks of keys and values of a layer."""

    layer: CompressedLayer

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return BLOCK * self.layer.blocks

    def logits(self, q: Tensor) -> Tensor:
        """Return logits of queries."""
        return block_logits(self.layer, 0, q)

    def sums(self, weights: Tensor) -> Tensor:
        """Return weighted sums of values."""
        return block_sums(self.layer, 1, weights)

    def attention(self, q: Tensor, mask: Tensor | None, softcap: float | None) -> PartialAttention:
        """Return attention over the segment, by one kernel if every query attends to consecutive tokens."""
        visible = None if mask is None else _limits(mask, q)
        partial = block_attention(self.layer, self.queries(q), visible, softcap) if mask is None or visible else None
        if partial is None:
            return super().attention(q, mask, softcap)
        return replace(partial, sums=self.expanded(partial.sums))

    def queries(self, q: Tensor) -> tuple[Tensor, ...]:
        """Return the queries of what is stored as keys and, for MLA, as values."""
        return (q,)

    def expanded(self, sums: Tensor) -> Tensor:
        """Expand weighted sums of what is stored to sums of values [batch, query heads, seq, dim]."""
        return sums


class Latent:
    """Projections of an MLA layer, which stores one latent as keys and one rotary key as values for all heads.

    Args:
        module: The model's attention module.
        rank: Width of the latent.

    Raises:
        UnsupportedArchitectureError: The up-projection adds a bias.
    """

    def __init__(self, module: nn.Module, rank: int) -> None:
        self.nope = module.qk_nope_head_dim
        name = f"layer {module.layer_idx}, kv_b_proj"
        weight, bias = linear_map(module.kv_b_proj, rank, name)  # type: ignore[arg-type]
        if bias is not None:
            raise UnsupportedArchitectureError(
                f"{name} adds a bias, which CompressedCache does not support: use a DynamicCache"
            )
        heads = weight.unflatten(0, (-1, self.nope + module.v_head_dim))  # type: ignore[operator]
        self.up_keys, self.up_values = heads.split([self.nope, module.v_head_dim], 1)  # type: ignore[list-item]

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries of the latent and of the rotary key."""
        nope = q[..., : self.nope].to(self.up_keys.dtype)
        return torch.einsum("bhsd,hdr->bhsr", nope, self.up_keys).float(), q[..., self.nope :]

    def expanded(self, latents: Tensor) -> Tensor:
        """Expand weighted sums of latents to sums of values [batch, heads, seq, dim] float32."""
        return torch.einsum("bhsr,hvr->bhsv", latents.to(self.up_values.dtype), self.up_values).float()


@dataclass(frozen=True, eq=False)
class PlainLatents(Plain):
    """Latents and rotary keys that are not packed."""

    latent: Latent

    def logits(self, q: Tensor) -> Tensor:
        """Return logits of queries."""
        of_latent, of_rotary = self.latent.queries(q)
        return _products(of_latent, self.keys).add_(_products(of_rotary, self.values))

    def sums(self, weights: Tensor) -> Tensor:
        """Return weighted sums of values."""
        return self.latent.expanded(_sums(weights, self.keys))


@dataclass(frozen=True, eq=False)
class LatentBlocks(Blocks):
    """Packed blocks of latents and rotary keys of a layer."""

    latent: Latent

    def queries(self, q: Tensor) -> tuple[Tensor, ...]:
        """Return the queries of the latent and of the rotary key."""
        return self.latent.queries(q)

    def expanded(self, sums: Tensor) -> Tensor:
        """Expand weighted sums of latents to sums of values."""
        return self.latent.expanded(sums)

    def logits(self, q: Tensor) -> Tensor:
        """Return logits of queries."""
        of_latent, of_rotary = self.latent.queries(q)
        return block_logits(self.layer, 0, of_latent).add_(block_logits(self.layer, 1, of_rotary))

    def sums(self, weights: Tensor) -> Tensor:
        """Return weighted sums of values."""
        return self.latent.expanded(block_sums(self.layer, 0, weights))


def segments_of(module: nn.Module, layer: CompressedLayer | None, key: Tensor, value: Tensor) -> list[Segment]:
    """Return what an attention module attends to, in the order of the tokens.

    Args:
        module: The model's attention module.
        layer: The compressed layer; None if its cache has nothing but a window.
        key: Keys of the window with the new tokens, as the module passes them: MLA has expanded them.
        value: Values of the window with the new tokens.

    Returns:
        Sinks and packed blocks, if there are any, and the window.
    """
    segments: list[Segment] = []
    latent = None
    if layer is not None and hasattr(module, "kv_b_proj") and has_past(layer):
        latent = Latent(module, layer.window[0].shape[-1])
    if layer is not None and layer.sinks is not None:
        sinks = layer.sinks.first(layer.wanted_sinks if layer.padded else layer.led)
        segments.append(PlainLatents(*sinks, latent) if latent else Plain(*sinks))
    if layer is not None and layer.chunks:
        segments.append(LatentBlocks(layer, latent) if latent else Blocks(layer))
    return [*segments, Plain(key, value)]


def has_past(layer: CompressedLayer) -> bool:
    """Return whether a layer has sinks or packed blocks besides its window."""
    return bool(layer.blocks) or layer.sinks is not None


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    """Apply a mask to logits in place: −∞ where a boolean mask is False, or plus a mask of numbers."""
    return logits.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else logits.add_(mask)


def _limits(mask: Tensor, q: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the first visible token and one past the last [batch, query heads, seq]; None if one between is hidden."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    count, first = seen.sum(-1), seen.byte().argmax(-1)
    last = seen.shape[-1] - seen.byte().flip(-1).argmax(-1)
    consecutive = (count == 0) | (last - first == count)
    if mask.dtype != torch.bool:
        consecutive = consecutive & (seen | (mask <= torch.finfo(mask.dtype).min)).all(-1)
    return (first.expand(q.shape[:3]), (first + count).expand(q.shape[:3])) if bool(consecutive.all()) else None


def _products(q: Tensor, keys: Tensor) -> Tensor:
    """Return q · k [batch, query heads, seq, tokens] float32 for grouped queries."""
    rows = q.reshape(len(q), keys.shape[1], -1, q.shape[3])
    return (rows @ keys.float().mT).view(*q.shape[:3], -1)


def _sums(weights: Tensor, values: Tensor) -> Tensor:
    """Return Σ a v [batch, query heads, seq, dim] float32 for grouped queries."""
    rows = weights.reshape(len(weights), values.shape[1], -1, weights.shape[3])
    return (rows @ values.float()).view(*weights.shape[:3], -1)
