"""Triton launches that read packed blocks on a GPU: attention, and the functions of `reference.py`.

`attend` serves one query per sequence as well as a chunk of a prompt. For MLA, latents are read once for logits and sums.
Tiles are chosen per shape; they are measured once where a launch reads enough bytes to tell tiles apart.
"""

# Triton specializes arguments, so the checker sees the wrong types here.
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from dataclasses import replace
from functools import lru_cache
from os import environ
from typing import Any

import torch
import triton
from torch import Tensor

from eigencache.kernels.packed.format import most_coefficients
from eigencache.kernels.packed.reference import AttentionQueries, PackedStorage
from eigencache.kernels.packed.triton.attend import attend_kernel
from eigencache.kernels.packed.triton.decode import decode_kernel
from eigencache.kernels.packed.triton.logits_and_sums import logits, sums
from eigencache.kernels.packed.triton.plan import (
    FEW,
    PAIRED_TILES,
    TILES,
    Tiles,
    describe_chunks,
    launch_options,
    pays,
    pieces_of,
    row_tile,
    slots_of,
    splits_for,
    usual_tiles,
)
from eigencache.kernels.packed.triton.queries import prepare_queries
from eigencache.kernels.packed.triton.register_tiles import rows_of
from eigencache.kernels.packed.triton.softmax import merge_kernel
from eigencache.kernels.packed.triton.tiles import padded, places, words_of

__all__ = ["PAIRED_TILES", "TILES", "Tiles", "attend", "attention", "logits", "sums"]
_TUNED = 2**25  # bytes that a launch reads, from which on tiles are measured
_INTERPRETED = environ.get("TRITON_INTERPRET") == "1"


def attention(storage: PackedStorage, queries: AttentionQueries) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result of `reference.attention`, normalized: the log-sum-exp takes the place of the largest logit."""
    means, lse = attend(storage, queries)
    return lse, torch.ones_like(lse).masked_fill_(lse == -torch.inf, 0), means


def attend(
    storage: PackedStorage,
    queries: AttentionQueries,
    *,
    splits: int | None = None,
    tiles: Tiles | None = None,
    paired: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention over packed blocks.

    Keys and values may have different numbers of bundles; the rows are then regrouped by heads. `splits`, `tiles` and
    `paired` are for measurements.

    Args:
        storage: packed blocks.
        queries: queries of the bundles of keys.
        splits: parts in which the blocks are read; None fills the GPU.
        tiles: tiles of the kernel; None chooses.
        paired: True uses the kernel of `decode.py`, False that of `attend.py`; None chooses.

    Returns:
        The means of integers weighted by softmax [batch, value bundles, rows, most], and the log-sum-exp of the logits
        [batch, value bundles, rows], both float32. A row without a visible token has zeros and −∞. For MLA, the means are of
        the latents.

    Raises:
        ValueError: latents and rotary keys of MLA have different numbers of bundles.
    """
    key_bundles, value_bundles = map(len, storage.widths)
    if queries.projected_rotary is not None:
        if key_bundles != value_bundles:
            raise ValueError(
                f"`storage` must have as many bundles of rotary keys as of latents, found {value_bundles} and {key_bundles}"
            )
        return _launch(storage, _regrouped(queries, key_bundles), splits, tiles, False)
    units = math.lcm(key_bundles, value_bundles)
    results = _launch(storage, _regrouped(queries, units), splits, tiles, paired)
    means, lse = (x.unflatten(1, (value_bundles, -1)).flatten(2, 3) for x in results)
    return means, lse


def _regrouped(queries: AttentionQueries, units: int) -> AttentionQueries:
    """Return queries whose bundles are cut to `units` of heads, the keys and the values of each being one bundle."""
    like = queries.projected
    batch, bundles, rows = like.shape[:3]
    constant, mean, visible = queries.constant, queries.rotated_mean, queries.visible

    def regroup(x: Tensor) -> Tensor:
        return x if units == bundles else x.reshape(batch, units, rows * bundles // units, *x.shape[3:])

    def limit(x: Tensor) -> Tensor:
        return regroup(x.to(like.device, torch.int32).expand(like.shape[:3]))

    return replace(
        queries,
        projected=regroup(like),
        constant=None if constant is None else regroup(constant),
        rotated_mean=mean and replace(mean, even=regroup(mean.even), odd=regroup(mean.odd)),
        visible=visible and (limit(visible[0]), limit(visible[1])),
    )


def _launch(
    storage: PackedStorage, queries: AttentionQueries, splits: int | None, tiles: Tiles | None, paired: bool | None
) -> tuple[Tensor, Tensor]:
    """Compute `attend` for queries [batch, units, rows, most] of units of heads."""
    q, rotary, mean = queries.projected, queries.projected_rotary, queries.rotated_mean
    key_widths, other_widths = storage.widths
    batch, units, rows, _ = q.shape
    items, device = batch * units, q.device
    most = most_coefficients(other_widths if rotary is None else key_widths)
    blocks = sum(chunk.shape[1] for chunk in storage.keys)
    sums, lse = torch.empty(batch, units, rows, most, device=device), torch.empty(batch, units, rows, device=device)
    if not (blocks and items and rows):
        return sums.zero_(), lse.fill_(-torch.inf)
    repeats = units // len(key_widths), units // len(other_widths)  # units that share a bundle
    key_places, other_places = places(key_widths, repeats[0], device), places(other_widths, repeats[1], device)
    key_size, other_size = key_places.shape[1], other_places.shape[1]
    k, v = rows_of(key_widths, repeats[0], device), rows_of(other_widths, repeats[1], device)
    tile = row_tile(rows, max(key_size, other_size), device)
    if paired is None:
        paired = rotary is None and pays(tile, (k.parts, v.parts), (key_size, other_size))
    default = usual_tiles(tile, max(key_size, other_size), paired)
    programs = items * triton.cdiv(rows, tile)
    splits = splits or splits_for(programs, blocks, slots_of(device, default))
    key_words, other_words = ([words_of(x) for x in chunks if x.shape[1]] for chunks in (storage.keys, storage.values))
    strides = key_words[0].shape[2], other_words[0].shape[2]
    pieces, ranges = pieces_of(describe_chunks(key_words, other_words), *strides, splits, device)
    splits = len(ranges) - 1
    parts, tops, totals = sums, lse, None
    if splits > 1:
        parts = torch.empty(splits, items, rows, most, device=device)
        tops, totals = torch.empty(2, splits, items, rows, device=device).unbind()
    factors = (None,) * 5 if mean is None else (mean.even, mean.odd, mean.cos, mean.sin, mean.table)
    pairs = 1 if mean is None else mean.even.shape[3]
    ready = prepare_queries(q, key_places, queries.exact, rotary, other_places, queries.constant)
    capped = queries.softcap is not None
    constants = {"M": tile, "C": key_size, "P": padded(pairs), "TERMS": 1 + queries.exact, "CAPPED": capped}
    layout: tuple[Any, ...]  # the parameters in which the kernels differ
    if paired:
        layout = k.bundles, k.nibbles, k.crumbs, v.bundles, ready.halves
        constants |= {"KW": k.wide, "KN": k.narrow, "VW": v.wide, "VN": v.narrow}
    else:
        layout = key_places, other_places, ready.halves, ready.others
        constants |= {"V": other_size, "AXIS": int(tile > FEW)}
    optional = (None if x is None else x.contiguous() for x in (*(queries.visible or (None, None)), *factors))
    blocks_read = key_words[0], other_words[0], pieces, ranges
    tensors = *blocks_read, *layout, ready.slope, ready.added, *optional, parts, tops, totals
    sizes = units, rows, most, *strides, blocks, pairs, float(queries.softcap or 0)
    if tiles is None and (_INTERPRETED or 4 * batch * blocks * sum(strides) < _TUNED):
        tiles = default
    with torch.cuda.device_of(q):
        if tiles is None:
            _tuned(paired)[programs, splits](*tensors, *sizes, **constants)
        else:
            kernel = decode_kernel if paired else attend_kernel
            kernel[programs, splits](*tensors, *sizes, **constants, **launch_options(tiles))
        if totals is not None:
            ends = {"V": padded(most), "S": padded(splits, 1)}
            merge_kernel[(items * rows,)](parts, tops, totals, sums, lse, splits, most, **ends)
    return sums, lse


@lru_cache(maxsize=2)
def _tuned(paired: bool) -> Any:
    """Return a kernel that measures, once per shape, which tiles are fastest."""
    configs = [
        triton.Config({"BLOCKS": blocks}, num_warps=warps, num_stages=stages, maxnreg=registers)
        for blocks, warps, stages, registers in (PAIRED_TILES if paired else TILES)
    ]
    key = ["M", "C", "P", "TERMS", "CAPPED", *(("KW", "KN", "VW", "VN") if paired else ("V", "AXIS"))]
    kernel = decode_kernel if paired else attend_kernel
    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": _possible_configs})(kernel)


def _possible_configs(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    """Return the tiles that a launch can use: with a rotated mean, tiles of one block."""
    return [c for c in configs if arguments["even"] is None or c.kwargs["BLOCKS"] == 1]
