"""Packed blocks read on a GPU by Triton: attention, and the functions of `kernels/packed/reference.py`.

`attend` serves one query of every sequence as well as a chunk of a prompt. Attention to the latents of MLA reads latents
once, for logits and sums. Tiles are chosen per shape: measured once where a launch reads enough to tell them apart.
"""

# What a kernel is called with is not what its parameters are inside of it.
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import environ
from typing import Any

import torch
import triton
from torch import Tensor

from eigencache.kernels.packed.format import Widths, most_coefficients
from eigencache.kernels.packed.reference import RotatedMeanLogits
from eigencache.kernels.packed.triton.attend import attend_kernel, merge_kernel
from eigencache.kernels.packed.triton.decode import decode_kernel
from eigencache.kernels.packed.triton.logits_and_sums import logits, sums
from eigencache.kernels.packed.triton.plan import (
    FEW,
    PAIRED_TILES,
    TILES,
    Tiles,
    described,
    options,
    pays,
    pieces_of,
    row_tile,
    slots_of,
    splits_for,
    usual,
)
from eigencache.kernels.packed.triton.queries import prepared
from eigencache.kernels.packed.triton.register_tiles import rows_of
from eigencache.kernels.packed.triton.tiles import padded, places, words_of

__all__ = ["PAIRED_TILES", "TILES", "Tiles", "attend", "attend_latents", "logits", "sums"]
_TUNED = 2**25  # bytes that a launch reads, from which on tiles are measured
_INTERPRETED = environ.get("TRITON_INTERPRET") == "1"


def attend(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_widths: tuple[Widths, ...],
    value_widths: tuple[Widths, ...],
    queries: Tensor,
    *,
    constant: Tensor | None = None,
    turned: RotatedMeanLogits | None = None,
    visible: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    exact: bool = False,
    splits: int | None = None,
    tiles: Tiles | None = None,
    paired: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax-weighed means of integers [batch, value bundles, rows, most], and the logarithm of what the weights sum up to.

    `keys` and `values`: chunks [batch, blocks, bytes], one after the other. `queries` [batch, key bundles, rows, most] as
    `PackedHeads.queries` makes them, with the model's scale, so that Σ_i q_i u_i + `constant` [batch, key bundles, rows] +
    `turned` is a logit. `visible`: the first packed token that a row sees and the one after the last, broadcast to
    [batch, key bundles, rows]; a row that sees none gets zeros and −∞. Where keys and values differ in their bundles, rows
    go with the heads. `exact`: as exact as float32, at some cost, else as a model in 16 bits. What is found is float32.
    `splits`, `tiles` and `paired` (the tiles of `packed_triton_pairs.py`, or not) are for measuring.
    """
    bundles, rows = len(key_widths), queries.shape[2]
    units = math.lcm(bundles, len(value_widths))
    regroup = _Regroup(len(queries), bundles, units, rows * bundles // units)
    found = _attended(
        keys,
        values,
        key_widths,
        value_widths,
        regroup(queries),
        None,
        regroup(constant),
        turned and RotatedMeanLogits(regroup(turned.even), regroup(turned.odd), turned.cos, turned.sin, turned.table),
        None if visible is None else (regroup(visible[0], queries), regroup(visible[1], queries)),
        softcap,
        exact,
        splits,
        tiles,
        paired,
    )
    sums, lse = (x.unflatten(1, (len(value_widths), -1)).flatten(2, 3) for x in found)
    return sums, lse


def attend_latents(
    latents: Sequence[Tensor],
    rotary: Sequence[Tensor],
    latent_widths: tuple[Widths, ...],
    rotary_widths: tuple[Widths, ...],
    latent_queries: Tensor,
    rotary_queries: Tensor,
    *,
    constant: Tensor | None = None,
    turned: RotatedMeanLogits | None = None,
    visible: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    exact: bool = False,
    splits: int | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """As `attend`, of MLA: logits of latents and of rotary keys add up, means are of latents, which are read once."""
    bundles, rows = len(latent_widths), latent_queries.shape[2]
    if len(rotary_widths) != bundles:
        raise ValueError(f"{bundles} bundles of latents and {len(rotary_widths)} of rotary keys: MLA has one of either")
    regroup = _Regroup(len(latent_queries), bundles, bundles, rows)
    return _attended(
        latents,
        rotary,
        latent_widths,
        rotary_widths,
        latent_queries,
        rotary_queries,
        constant,
        turned,
        None if visible is None else (regroup(visible[0], latent_queries), regroup(visible[1], latent_queries)),
        softcap,
        exact,
        splits,
        tiles,
        False,
    )


@dataclass(frozen=True)
class _Regroup:
    """What has bundles of keys [batch, bundles, rows, …] by units of heads whose keys and values are one bundle each."""

    batch: int
    bundles: int
    units: int
    rows: int

    def __call__(self, x: Any, like: Tensor | None = None) -> Any:
        if x is None:
            return None
        if like is not None:
            x = x.to(like.device, torch.int32).expand(like.shape[:3])
        return x.reshape(self.batch, self.units, self.rows, *x.shape[3:]) if self.units != self.bundles else x


def _attended(
    keys: Sequence[Tensor],
    others: Sequence[Tensor],
    key_widths: tuple[Widths, ...],
    other_widths: tuple[Widths, ...],
    queries: Tensor,
    rotary_queries: Tensor | None,
    constant: Tensor | None,
    turned: RotatedMeanLogits | None,
    visible: tuple[Tensor, Tensor] | None,
    softcap: float | None,
    exact: bool,
    splits: int | None,
    tiles: Tiles | None,
    paired: bool | None,
) -> tuple[Tensor, Tensor]:
    """As `attend`, of units of heads; or as `attend_latents` where there are queries of `others`."""
    batch, units, rows, _ = queries.shape
    items, device = batch * units, queries.device
    most = most_coefficients(key_widths if rotary_queries is not None else other_widths)
    blocks = sum(chunk.shape[1] for chunk in keys)
    sums, lse = torch.empty(batch, units, rows, most, device=device), torch.empty(batch, units, rows, device=device)
    if not (blocks and items and rows):
        return sums.zero_(), lse.fill_(-torch.inf)
    shared = units // len(key_widths), units // len(other_widths)  # units of a bundle
    key_places, other_places = places(key_widths, shared[0], device), places(other_widths, shared[1], device)
    widest = max(key_places.shape[1], other_places.shape[1])
    tile = row_tile(rows, widest, device)
    k, v = rows_of(key_widths, shared[0], device), rows_of(other_widths, shared[1], device)
    if paired is None:
        paired = rotary_queries is None and pays(tile, (k.parts, v.parts), (key_places.shape[1], other_places.shape[1]))
    programs = items * triton.cdiv(rows, tile)
    default = usual(tile, widest, paired)
    splits = splits or splits_for(programs, blocks, slots_of(device, default))
    key_words, other_words = ([words_of(chunk) for chunk in x if chunk.shape[1]] for x in (keys, others))
    strides = key_words[0].shape[2], other_words[0].shape[2]
    pieces, ranges = pieces_of(described(key_words, other_words), *strides, splits, device)
    splits = len(ranges) - 1
    parts, tops, totals = sums, lse, None
    if splits > 1:
        parts = torch.empty(splits, items, rows, most, device=device)
        tops, totals = torch.empty(2, splits, items, rows, device=device).unbind()
    turns = (None,) * 5 if turned is None else (turned.even, turned.odd, turned.cos, turned.sin, turned.table)
    pairs = 1 if turned is None else turned.even.shape[3]
    ready = prepared(queries, key_places, exact, rotary_queries, other_places, constant)
    constants = {"M": tile, "C": key_places.shape[1], "P": padded(pairs), "TERMS": 1 + exact, "CAPPED": softcap is not None}
    if paired:
        own: tuple[Any, ...] = (k.bundles, k.nibbles, k.crumbs, v.bundles, ready.halves)
        constants |= {"KW": k.wide, "KN": k.narrow, "VW": v.wide, "VN": v.narrow}
    else:
        own = key_places, other_places, ready.halves, ready.others
        constants |= {"V": other_places.shape[1], "AXIS": int(tile > FEW)}
    limits = (None if x is None else x.contiguous() for x in (*(visible or (None, None)), *turns))
    tensors = key_words[0], other_words[0], pieces, ranges, *own, ready.slope, ready.added, *limits, parts, tops, totals
    sizes = units, rows, most, *strides, blocks, pairs, float(softcap or 0)
    if tiles is None and (_INTERPRETED or 4 * batch * blocks * sum(strides) < _TUNED):
        tiles = default
    with torch.cuda.device_of(queries):
        kernel = decode_kernel if paired else attend_kernel
        if tiles is None:
            _tuned(paired)[programs, splits](*tensors, *sizes, **constants)
        else:
            kernel[programs, splits](*tensors, *sizes, **constants, **options(tiles))
        if totals is not None:
            ends = {"V": padded(most), "S": padded(splits, 1)}
            merge_kernel[(items * rows,)](parts, tops, totals, sums, lse, splits, most, **ends)
    return sums, lse


@lru_cache(maxsize=2)
def _tuned(paired: bool) -> Any:
    """A kernel in the tiles that are fastest for a shape."""
    configs = [
        triton.Config({"BLOCKS": blocks}, num_warps=warps, num_stages=stages, maxnreg=registers)
        for blocks, warps, stages, registers in (PAIRED_TILES if paired else TILES)
    ]
    key = ["M", "C", "P", "TERMS", "CAPPED", *(("KW", "KN", "VW", "VN") if paired else ("V", "AXIS"))]
    kernel = decode_kernel if paired else attend_kernel
    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": _possible})(kernel)


def _possible(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    """A mean that turns does so block by block."""
    return [c for c in configs if arguments["even"] is None or c.kwargs["BLOCKS"] == 1]
