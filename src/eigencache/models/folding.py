"""Folding of the bases of a codec into the weights, so that attention reads coefficients directly (THEORY 8, 9).

The logits equal those of decoding before attention. With x̂ = μ + D y per KV head, q·k̂ = (D_k q)·y + q·μ_k; the last term
is equal for all tokens, and softmax cancels it. Σ a v̂ W_O = (Σ a y) (D_v W_O) + μ_v W_O, because the weights a of a query
sum to one. The basis of an MLA latent is folded into kv_b_proj. The cache stores only coefficients, in the dtype of the
model. Keys are compressed after rotation, because rotation and basis do not commute.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from eigencache.codec.pca import PCACodec
from eigencache.errors import CodecError, UnsupportedArchitectureError
from eigencache.geometry import KVGeometry
from eigencache.models.linear_map import linear_map
from eigencache.models.output_projection import output_projection, output_rows
from eigencache.spectral.transform import Transform

ATTENTION = "eigencache_folded"
Basis = dict[tuple[int, int], list[Transform]]  # (layer, slot) → one transform per KV head


class _Coefficients(DynamicLayer):
    """A cache layer that stores coefficients and returns them, decoded or not."""

    def __init__(self, bases: list[list[Transform] | None], decoded: bool) -> None:
        super().__init__()
        self.bases, self.decoded = bases, decoded

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Encode and store the new tokens; return the whole past as coefficients, or decoded."""
        pair = [
            x if basis is None else _per_head(x, basis, Transform.encode)
            for x, basis in zip((key_states, value_states), self.bases, strict=True)
        ]
        stored = super().update(*pair)
        if not self.decoded:
            return stored
        keys, values = (
            x if basis is None else _per_head(x, basis, Transform.decode)
            for x, basis in zip(stored, self.bases, strict=True)
        )
        return keys, values


def _per_head(x: Tensor, basis: list[Transform], apply: Callable[[Transform, Tensor], Tensor]) -> Tensor:
    return torch.stack([apply(transform, x[:, head]) for head, transform in enumerate(basis)], 1)


def coefficient_cache(model: PreTrainedModel, codec: PCACodec, *, decoded: bool) -> DynamicCache:
    """Return a cache that stores the coefficients of all tokens, including the newest.

    Args:
        model: The model.
        codec: Codec with one basis per head.
        decoded: Return decoded vectors x̂ to attention if true, coefficients y otherwise.

    Raises:
        CodecError: A basis spans heads, or applies to keys before rotation.
        UnsupportedArchitectureError: A layer has a sliding window.
    """
    bases, cache = bases_of(codec, model.dtype, model.device), DynamicCache(config=model.config)
    for layer_idx, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            raise UnsupportedArchitectureError(
                f"{model.config.model_type}: layer {layer_idx} has a sliding window: folding requires full attention"
            )
        if type(layer) is DynamicLayer:
            cache.layers[layer_idx] = _Coefficients([bases.get((layer_idx, slot)) for slot in (0, 1)], decoded)
    return cache


def bases_of(codec: PCACodec, dtype: torch.dtype, device: torch.device) -> Basis:
    """Return the transforms of a codec by layer and slot, one per KV head.

    Args:
        codec: Codec with one basis per head.
        dtype: Dtype of the returned transforms.
        device: Device of the returned transforms.

    Raises:
        CodecError: A basis spans heads, or applies to keys before rotation.
    """
    if codec.rotations and any(
        slot == part.slot for slot, _ in codec.rotations.values() for g in codec.groups for part in g.parts
    ):
        raise CodecError(f"{codec.name}: keys before rotation cannot be folded: fit them after rotation (`frame` post)")
    transforms: dict[tuple[int, int], dict[int, Transform]] = {}
    for group in codec.groups:
        part = group.parts[0]
        if len(group.parts) > 1 or part.heads[1] - part.heads[0] > 1:
            raise CodecError(f"{codec.name}: a basis that spans heads cannot be folded: fit it at `scope` head")
        transforms.setdefault((part.layer_idx, part.slot), {})[part.heads[0]] = group.transform.to(dtype, device)
    return {place: _of_one_rank([heads[h] for h in sorted(heads)]) for place, heads in transforms.items()}


def _of_one_rank(heads: list[Transform]) -> list[Transform]:
    """Give all heads as many coefficients as the one with most: heads with dead dimensions have fewer."""
    lacking = [max(t.rank for t in heads) - t.rank for t in heads]
    return [
        replace(t, encoder=F.pad(t.encoder, (0, n)), decoder=F.pad(t.decoder, (0, 0, 0, n))) if n else t
        for t, n in zip(heads, lacking, strict=True)
    ]


@contextmanager
def folded(model: PreTrainedModel, geometry: KVGeometry, codec: PCACodec) -> Iterator[DynamicCache]:
    """Fold the bases of a codec into the weights of a model while the context is open; always undone on exit.

    Args:
        model: The model; it is changed in place.
        geometry: Its geometry.
        codec: Codec with one basis per head, for keys after rotation.

    Yields:
        The cache of coefficients with which to run the model.

    Raises:
        CodecError: The codec cannot be folded.
        UnsupportedArchitectureError: A layer has a sliding window, or its output projection is not linear.
    """
    bases = bases_of(codec, model.dtype, model.device)
    before: str = model.config._attn_implementation  # type: ignore[assignment]
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for attention in model.modules():
            layer_idx, output = getattr(attention, "layer_idx", None), output_projection(attention)
            if output is None or not isinstance(layer_idx, int):
                continue
            if geometry.mla and (layer_idx, 1) in bases:
                raise CodecError(f"{codec.name}: the rotary key cannot be folded: choose `target` latent")
            if geometry.mla and (basis := bases.get((layer_idx, 0))):
                up: nn.Module = attention.kv_b_proj  # type: ignore[assignment]
                _swap(swapped, attention, "kv_b_proj", _after_decoding(up, basis[0]))
            elif basis := bases.get((layer_idx, 1)):
                name, projection = output
                rows, bias = output_rows(projection, geometry.layers[layer_idx])
                _swap(swapped, attention, name, _output(rows, bias, basis))
        if not geometry.mla:
            _register(bases)
            model.set_attn_implementation(ATTENTION)
        yield coefficient_cache(model, codec, decoded=False)
    finally:
        for owner, name, module in swapped:
            setattr(owner, name, module)
        model.set_attn_implementation(before)


def _swap(swapped: list[tuple[nn.Module, str, nn.Module]], owner: nn.Module, name: str, module: nn.Module) -> None:
    swapped.append((owner, name, getattr(owner, name)))
    setattr(owner, name, module)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = (nn.Parameter(x.contiguous(), requires_grad=False) for x in (weight, bias))
    return linear


def _output(rows: Tensor, bias: Tensor | None, basis: list[Transform]) -> nn.Linear:
    """Return the layer D_v W_O with μ_v W_O in its bias; `rows` is W_O [query heads, v_head_dim, hidden]."""
    group = len(rows) // len(basis)
    weight = torch.cat([basis[h // group].decoder @ rows[h] for h in range(len(rows))])
    mean = sum(basis[h // group].mean @ rows[h] for h in range(len(rows)))
    return _linear(weight.mT, mean if bias is None else mean + bias)  # type: ignore[arg-type]


def _after_decoding(up: nn.Module, transform: Transform) -> nn.Linear:
    """Return kv_b_proj of x̂ = μ + D y as a linear layer of y."""
    weight, bias = linear_map(up, len(transform.mean), "kv_b_proj")
    weight = weight.detach()
    mean = weight @ transform.mean
    return _linear(weight @ transform.decoder.mT, mean if bias is None else mean + bias.detach())


def _register(bases: Basis) -> None:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Compute plain attention with queries in the basis of the keys; values may be narrower than keys."""
        group = query.shape[1] // key.shape[1]
        if basis := bases.get((module.layer_idx, 0)):  # type: ignore[arg-type]
            decoders = torch.stack([t.decoder for t in basis]).repeat_interleave(group, 0)
            query = query @ decoders.mT
        scores = query @ key.repeat_interleave(group, 1).mT * scaling
        if mask is None:
            length, seen = scores.shape[-2:]
            mask = torch.ones(length, seen, dtype=torch.bool, device=scores.device).tril(seen - length)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
