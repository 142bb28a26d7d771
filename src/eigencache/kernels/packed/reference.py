"""Attention over packed blocks in plain PyTorch, on any device: the reference that every faster backend is tested against.

The module also defines what all backends receive: `PackedStorage`, `AttentionQueries` and the factors of a rotated mean.
`format.py` describes the blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigencache.kernels.packed.format import BLOCK, Widths, digit_layout, pack, unpack

_TILE = 16  # blocks that are unpacked at a time


@dataclass(frozen=True, eq=False)
class RotatedMeanLogits:
    """Logits of a rotated key mean in factors: Σ_p even_p cos(nθ_p) + odd_p sin(nθ_p) at position n, float32.

    Attributes:
        even: [batch, bundles, rows, pairs] factors of the cosines.
        odd: [batch, bundles, rows, pairs] factors of the sines.
        cos: [batch, blocks, pairs] cosines at the first token of every block.
        sin: [batch, blocks, pairs] sines at the first token of every block.
        table: [2 · pairs, 64] cosines, then sines, of the tokens of a block counted from its first token.
    """

    even: Tensor
    odd: Tensor
    cos: Tensor
    sin: Tensor
    table: Tensor

    def bundled(self, bundles: int) -> "RotatedMeanLogits":
        """Return a copy whose dimension of heads is regrouped to `bundles`, the rows of a bundle's heads side by side."""
        even, odd = (x.unflatten(1, (bundles, -1)).flatten(2, 3) for x in (self.even, self.odd))
        return replace(self, even=even, odd=odd)

    def logits(self) -> Tensor:
        """Return the logits [batch, bundles, rows, 64 · blocks], computed by the addition theorems."""
        even, odd = self.even[..., None, :], self.odd[..., None, :]
        cos, sin = self.cos[:, None, None], self.sin[:, None, None]
        return (torch.cat([even * cos + odd * sin, odd * cos - even * sin], -1) @ self.table).flatten(-2)


@dataclass(frozen=True, eq=False)
class RotatedMean:
    """A key mean μ rotated to position n in factors: R_n μ = still cos(nθ) + quarter sin(nθ), float32.

    Every number of a vector has the angle θ of its pair.

    Attributes:
        still: [heads, dim] R_0 μ.
        quarter: [heads, dim] R_0 μ rotated by a right angle.
        starts: [2, batch, blocks, dim] cosines and sines at the first token of every block.
        table: [2, dim, 64] cosines and sines of the tokens of a block counted from its first token.
    """

    still: Tensor
    quarter: Tensor
    starts: Tensor
    table: Tensor

    def of_tokens(self) -> Tensor:
        """Return R_n μ of every token [batch, heads, 64 · blocks, dim], computed by the addition theorems."""
        (first_cos, first_sin), (cos, sin) = self.starts[:, :, :, None], self.table.mT
        n_cos, n_sin = (
            x.flatten(1, 2)[:, None] for x in (first_cos * cos - first_sin * sin, first_sin * cos + first_cos * sin)
        )
        return self.still[:, None] * n_cos + self.quarter[:, None] * n_sin


@dataclass(frozen=True, eq=False)
class PackedStorage:
    """The packed blocks of one layer.

    For MLA, `keys` are the latents and `values` are the rotary keys.

    Attributes:
        keys: chunks uint8 [batch, blocks, bytes], in the order of their tokens.
        values: chunks of the same numbers of blocks as `keys`.
        widths: bit widths of the bundles of keys and of values.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    widths: tuple[tuple[Widths, ...], tuple[Widths, ...]]


@dataclass(frozen=True, eq=False)
class AttentionQueries:
    """Queries to a `PackedStorage`. A logit is Σ_i q_i u_i + `constant` + the logits of `rotated_mean`.

    Attributes:
        projected: [batch, bundles, rows, most] queries from `PackedHeads.queries`, with the model's scale.
        constant: [batch, bundles, rows] added to all logits of a row.
        projected_rotary: [batch, bundles, rows, most] queries of the rotary keys of MLA, which lie in the slot of values.
            Their products are added to the logits, and the weights apply to the slot of keys, the latents.
        rotated_mean: the logits of a rotated key mean.
        visible: the first visible token of each row and the token after the last, broadcast to [batch, bundles, rows].
            None: all tokens are visible.
        softcap: logits x become softcap · tanh(x / softcap); None: no cap.
        exact: True asks for the precision of float32, False for that of a model in 16 bits.
    """

    projected: Tensor
    constant: Tensor | None = None
    projected_rotary: Tensor | None = None
    rotated_mean: RotatedMeanLogits | None = None
    visible: tuple[Tensor, Tensor] | None = None
    softcap: float | None = None
    exact: bool = True


def encode(
    x: Tensor,
    mean: Tensor,
    encoder: Tensor,
    widths: tuple[Widths, ...],
    six: tuple[int, ...] = (),
    rotated_mean: RotatedMean | None = None,
) -> Tensor:
    """Encode keys or values to packed bytes: integers round(E (x − μ) + c), c = (2^b − 1)/2. Out-of-range values saturate.

    Args:
        x: [batch, heads, 64 · blocks, dim] vectors.
        mean: [heads, dim] μ.
        encoder: [bundles, most, numbers of a bundle] E, with the quantization steps.
        widths: bit widths of every bundle.
        six: number of coefficients of 6 bits of every bundle, as for `digit_layout`.
        rotated_mean: a mean that is subtracted too, depending on the position.

    Returns:
        Bytes uint8 [batch, blocks, bytes].
    """
    centered = x.float() - mean[:, None] - (0 if rotated_mean is None else rotated_mean.of_tokens())
    y = encoder @ centered.unflatten(1, (len(widths), -1)).transpose(2, 3).flatten(3).mT
    limits, shifts, masks = (t.to(y.device)[:, :, None] for t in digit_layout(widths, six))
    codes = (y + limits / 2).round_().clamp_(min=torch.zeros_like(limits), max=limits).to(torch.uint8)
    return pack((codes >> shifts) & masks if any(six) else codes, widths)


def logits(packed: Tensor, widths: Sequence[Widths], queries: Tensor) -> Tensor:
    """Return Σ_i q_i u_i of packed integers u.

    Args:
        packed: [batch, blocks, bytes] blocks.
        widths: bit widths of every bundle.
        queries: [batch, bundles, rows, most] queries, with the quantization steps.

    Returns:
        Logits float32 [batch, bundles, rows, 64 · blocks].
    """
    return torch.cat([queries @ unpack(tile, widths).to(queries) for tile in packed.split(_TILE, 1)], -1)


def sums(packed: Tensor, widths: Sequence[Widths], weights: Tensor) -> Tensor:
    """Return Σ_t a_t u_t of packed integers u.

    Args:
        packed: [batch, blocks, bytes] blocks.
        widths: bit widths of every bundle.
        weights: [batch, bundles, rows, 64 · blocks] weights a.

    Returns:
        Weighted sums float32 [batch, bundles, rows, most].
    """
    tiles = zip(packed.split(_TILE, 1), weights.split(_TILE * BLOCK, -1), strict=True)
    return sum(a @ unpack(tile, widths).to(a).mT for tile, a in tiles)  # type: ignore[return-value]


def attention(storage: PackedStorage, queries: AttentionQueries) -> tuple[Tensor, Tensor, Tensor]:
    """Compute softmax attention over all packed blocks of a layer.

    Returns:
        The largest logit [batch, bundles, rows], the sum of the weights relative to it [batch, bundles, rows], and the
        weighted sums of integers [batch, bundles, rows, most]. A row without a visible token has −∞, 0 and zeros.
    """
    key_widths, value_widths = storage.widths
    x = torch.cat([logits(chunk, key_widths, queries.projected) for chunk in storage.keys], -1)
    if queries.projected_rotary is not None:
        x = x + torch.cat([logits(chunk, value_widths, queries.projected_rotary) for chunk in storage.values], -1)
    x = x + (0 if queries.constant is None else queries.constant[..., None])
    x = x + (0 if queries.rotated_mean is None else queries.rotated_mean.logits())
    if queries.softcap is not None:
        x = queries.softcap * (x / queries.softcap).tanh()
    if queries.visible is not None:
        token, (first, stop) = torch.arange(x.shape[-1], device=x.device), (limit[..., None] for limit in queries.visible)
        x = x.masked_fill((token < first) | (token >= stop), -torch.inf)
    top = x.amax(-1)
    weights = (x - top.clamp_min(torch.finfo(x.dtype).min)[..., None]).exp()
    chunks, widths = (storage.values, value_widths) if queries.projected_rotary is None else (storage.keys, key_widths)
    parts = weights.split([BLOCK * chunk.shape[1] for chunk in chunks], -1)
    summed = [sums(chunk, widths, part) for chunk, part in zip(chunks, parts, strict=True)]
    return top, weights.sum(-1), sum(summed[1:], summed[0])
