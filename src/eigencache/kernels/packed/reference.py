"""Attention inside packed codes in plain PyTorch, on any device: what every faster backend is held against.

Heads that share a basis are a bundle. A block is 64 tokens of one layer: the bundles one after the other, of each the
integers of its coefficients, those of 8 bits first, then of 4, then of 2, each a row of 64 tokens. A byte holds one token of
1, 2 or 4 coefficients: of g coefficients of 4 bits, byte row i has i in its low and i + g/2 in its high half, of g of 2 bits
i, i + g/4, i + g/2 and i + 3g/4 from the lowest bits on. An integer u of b bits stands for u − (2^b − 1)/2 steps: static,
symmetric, without an exact zero. Steps are folded into the queries and into what is expanded afterwards, so that nothing
is multiplied per token but the integers themselves, and what stands for zero is one vector for all (THEORY 8).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigencache.kernels.packed.format import (
    BLOCK,
    Widths,
    digits_of,
    pack,
    unpack,
)

_TILE = 16  # blocks that are unpacked at a time


@dataclass(frozen=True, eq=False)
class RotatedMeanLogits:
    """Keys' mean that turns with their position, as logits Σ_p even_p cos(nθ_p) + odd_p sin(nθ_p), float32.

    `even`, `odd` [batch, bundles, rows, pairs]; `cos`, `sin` [batch, blocks, pairs] of the first token of every block;
    `table` [2 · pairs, 64] cos, then sin, of the tokens of a block counted from its first.
    """

    even: Tensor
    odd: Tensor
    cos: Tensor
    sin: Tensor
    table: Tensor

    def bundled(self, bundles: int) -> "RotatedMeanLogits":
        """The same with the rows of a bundle's heads one after the other."""
        even, odd = (x.unflatten(1, (bundles, -1)).flatten(2, 3) for x in (self.even, self.odd))
        return replace(self, even=even, odd=odd)

    def logits(self) -> Tensor:
        """[batch, bundles, rows, 64 · blocks], by the sum of two angles."""
        even, odd = self.even[..., None, :], self.odd[..., None, :]
        cos, sin = self.cos[:, None, None], self.sin[:, None, None]
        return (torch.cat([even * cos + odd * sin, odd * cos - even * sin], -1) @ self.table).flatten(-2)


@dataclass(frozen=True, eq=False)
class RotatedMean:
    """R_n μ = `still` cos nθ + `quarter` sin nθ [heads, dim], where every number of a vector has its pair's angle.

    `still` is R_0 μ, `quarter` the same turned by a right angle; `starts` [2, batch, blocks, dim] cos and sin of the first
    token of every block; `table` [2, dim, 64] of the tokens of a block counted from its first. All float32.
    """

    still: Tensor
    quarter: Tensor
    starts: Tensor
    table: Tensor

    def of_tokens(self) -> Tensor:
        """R_n μ [batch, heads, 64 · blocks, dim], by the sum of two angles."""
        (first_cos, first_sin), (cos, sin) = self.starts[:, :, :, None], self.table.mT
        n_cos, n_sin = (
            x.flatten(1, 2)[:, None] for x in (first_cos * cos - first_sin * sin, first_sin * cos + first_cos * sin)
        )
        return self.still[:, None] * n_cos + self.quarter[:, None] * n_sin


@dataclass(frozen=True, eq=False)
class PackedStorage:
    """What a layer holds packed: storages of keys and of values [batch, blocks, bytes], one after the other, and widths."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    widths: tuple[tuple[Widths, ...], tuple[Widths, ...]]


@dataclass(frozen=True, eq=False)
class AttentionQueries:
    """What is asked of it: `queries` [batch, bundles, rows, most] as `PackedHeads.queries` makes them, in the model's scale.

    A logit is Σ_i q_i u_i + `constant` [batch, bundles, rows] + what `turned` gives. `others`: queries of what lies in the
    slot of values, as rotary keys of MLA do: then logits add up, and what is weighed is the slot of keys. `visible`: the
    first packed token that a row sees and the one after the last, broadcast to [batch, bundles, rows]; none: all. `exact`:
    as exact as float32, else as a model in 16 bits is.
    """

    queries: Tensor
    constant: Tensor | None = None
    others: Tensor | None = None
    turned: RotatedMeanLogits | None = None
    visible: tuple[Tensor, Tensor] | None = None
    softcap: float | None = None
    exact: bool = True


def encode(
    x: Tensor,
    mean: Tensor,
    encoder: Tensor,
    widths: tuple[Widths, ...],
    six: tuple[int, ...] = (),
    turned: RotatedMean | None = None,
) -> Tensor:
    """Bytes uint8 [batch, blocks, bytes] of x [batch, heads, 64 · blocks, dim]: integers round(E (x − μ) + c).

    What lies beyond the widest integer becomes that. `mean` [heads, dim], `encoder` [bundles, most, numbers of a bundle],
    `six` as in `digits_of`.
    """
    left = x.float() - mean[:, None] - (0 if turned is None else turned.of_tokens())
    y = encoder @ left.unflatten(1, (len(widths), -1)).transpose(2, 3).flatten(3).mT
    most, shifts, masks = (t.to(y.device)[:, :, None] for t in digits_of(widths, six))
    codes = (y + most / 2).round_().clamp_(min=torch.zeros_like(most), max=most).to(torch.uint8)
    return pack((codes >> shifts) & masks if any(six) else codes, widths)


def logits(packed: Tensor, widths: Sequence[Widths], queries: Tensor) -> Tensor:
    """Σ_i q_i u_i [batch, bundles, rows, tokens] float32 of queries [batch, bundles, rows, most], steps within.

    `packed` [batch, blocks, bytes].
    """
    return torch.cat([queries @ unpack(tile, widths).to(queries) for tile in packed.split(_TILE, 1)], -1)


def sums(packed: Tensor, widths: Sequence[Widths], weights: Tensor) -> Tensor:
    """Σ_t a_t u_t [batch, bundles, rows, most] float32 of weights [batch, bundles, rows, tokens]."""
    tiles = zip(packed.split(_TILE, 1), weights.split(_TILE * BLOCK, -1), strict=True)
    return sum(a @ unpack(tile, widths).to(a).mT for tile, a in tiles)  # type: ignore[return-value]


def attention(held: PackedStorage, asked: AttentionQueries) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all that is held: the largest logit, the sum of weights relative to it [batch, bundles, rows], and what
    they weigh [batch, bundles, rows, most], integers that is. A row that sees nothing has −∞, zero and zeros."""
    of_keys, of_values = held.widths
    x = torch.cat([logits(storage, of_keys, asked.queries) for storage in held.keys], -1)
    if asked.others is not None:
        x = x + torch.cat([logits(storage, of_values, asked.others) for storage in held.values], -1)
    x = x + (0 if asked.constant is None else asked.constant[..., None])
    x = x + (0 if asked.turned is None else asked.turned.logits())
    if asked.softcap is not None:
        x = asked.softcap * (x / asked.softcap).tanh()
    if asked.visible is not None:
        at, (first, stop) = torch.arange(x.shape[-1], device=x.device), (limit[..., None] for limit in asked.visible)
        x = x.masked_fill((at < first) | (at >= stop), -torch.inf)
    top = x.amax(-1)
    weights = (x - top.clamp_min(torch.finfo(x.dtype).min)[..., None]).exp()
    slot, widths = (held.values, of_values) if asked.others is None else (held.keys, of_keys)
    parts = weights.split([BLOCK * storage.shape[1] for storage in slot], -1)
    found = [sums(storage, widths, part) for storage, part in zip(slot, parts, strict=True)]
    return top, weights.sum(-1), sum(found[1:], found[0])
