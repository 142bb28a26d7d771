"""Attention on coefficients gives the logits of decode-then-attend: the bases move into the weights (THEORY 8, 9).

With x̂ = μ + D y per KV head: q·k̂ = (D_k q)·y + q·μ_k, of which the last term is alike for all tokens and leaves
softmax; Σ a v̂ W_O = (Σ a y) (D_v W_O) + μ_v W_O, because the a of a query sum to one. An MLA latent goes through
kv_b_proj, so its basis moves there. The cache holds coefficients alone, in the model's dtype. Keys are compressed after
rotation: a rotation cannot pass a basis.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
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
    """A cache layer that holds coefficients, and gives them back as they are or decoded."""

    def __init__(self, bases: list[list[Transform] | None], decoded: bool) -> None:
        super().__init__()
        self.bases, self.decoded = bases, decoded

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Encode what is new; the whole past comes back as coefficients, or decoded."""
        pair = [
            x if basis is None else _per_head(x, basis, Transform.encode)
            for x, basis in zip((key_states, value_states), self.bases, strict=True)
        ]
        held = super().update(*pair)
        if not self.decoded:
            return held
        keys, values = (
            x if basis is None else _per_head(x, basis, Transform.decode) for x, basis in zip(held, self.bases, strict=True)
        )
        return keys, values


def _per_head(x: Tensor, basis: list[Transform], apply: Callable[[Transform, Tensor], Tensor]) -> Tensor:
    return torch.stack([apply(transform, x[:, head]) for head, transform in enumerate(basis)], 1)


def coefficient_cache(model: PreTrainedModel, codec: PCACodec, *, decoded: bool) -> DynamicCache:
    """A cache of the coefficients of every token, the newest too; `decoded` gives attention x̂, otherwise y.

    Raises `CodecError` for a codec whose bases are not per head, `UnsupportedArchitectureError` for layers with a window.
    """
    bases, cache = bases_of(codec, model.dtype, model.device), DynamicCache(config=model.config)
    for layer_idx, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            raise UnsupportedArchitectureError(
                f"{model.config.model_type}: layer {layer_idx} has a window: folding needs full attention"
            )
        if type(layer) is DynamicLayer:
            cache.layers[layer_idx] = _Coefficients([bases.get((layer_idx, slot)) for slot in (0, 1)], decoded)
    return cache


def bases_of(codec: PCACodec, dtype: torch.dtype, device: torch.device) -> Basis:
    """The codec's transforms by layer, slot and head. Raises `CodecError` where one spans heads, or keys are unrotated."""
    if codec.rotations and any(
        slot == part.slot for slot, _ in codec.rotations.values() for g in codec.groups for part in g.parts
    ):
        raise CodecError(f"{codec.name}: keys before rotation cannot be folded: fit them after rotation (frame post)")
    found: dict[tuple[int, int], dict[int, Transform]] = {}
    for group in codec.groups:
        part = group.parts[0]
        if len(group.parts) > 1 or part.heads[1] - part.heads[0] > 1:
            raise CodecError(f"{codec.name}: a basis that spans heads cannot be folded: fit it at scope head")
        found.setdefault((part.layer_idx, part.slot), {})[part.heads[0]] = group.transform.to(dtype, device)
    return {place: [heads[h] for h in sorted(heads)] for place, heads in found.items()}


@contextmanager
def folded(model: PreTrainedModel, geometry: KVGeometry, codec: PCACodec) -> Iterator[DynamicCache]:
    """The model with the codec's bases in its weights, and the cache to run it with; undone afterwards, whatever happens."""
    bases = bases_of(codec, model.dtype, model.device)
    before: str = model.config._attn_implementation  # type: ignore[assignment]
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for attention in model.modules():
            layer_idx, found = getattr(attention, "layer_idx", None), output_projection(attention)
            if found is None or not isinstance(layer_idx, int):
                continue
            if geometry.mla and (layer_idx, 1) in bases:
                raise CodecError(f"{codec.name}: the rotary key cannot be folded: choose `target` latent")
            if geometry.mla and (basis := bases.get((layer_idx, 0))):
                up: nn.Module = attention.kv_b_proj  # type: ignore[assignment]
                _swap(swapped, attention, "kv_b_proj", _after_decoding(up, basis[0]))
            elif basis := bases.get((layer_idx, 1)):
                name, projection = found
                rows, own = output_rows(projection, geometry.layers[layer_idx])
                _swap(swapped, attention, name, _output(rows, own, basis))
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


def _output(rows: Tensor, own: Tensor | None, basis: list[Transform]) -> nn.Linear:
    """D_v W_O per query head, and μ_v W_O in the bias; `rows` [query heads, v_head_dim, hidden], `own` its bias."""
    group = len(rows) // len(basis)
    weight = torch.cat([basis[h // group].decoder @ rows[h] for h in range(len(rows))])
    bias = sum(basis[h // group].mean @ rows[h] for h in range(len(rows)))
    return _linear(weight.mT, bias if own is None else bias + own)  # type: ignore[arg-type]


def _after_decoding(up: nn.Module, transform: Transform) -> nn.Linear:
    """kv_b_proj of x̂ = μ + D y, as a layer that takes y."""
    weight, own = linear_map(up, len(transform.mean), "kv_b_proj")
    weight = weight.detach()
    bias = weight @ transform.mean
    return _linear(weight @ transform.decoder.mT, bias if own is None else bias + own.detach())


def _register(bases: Basis) -> None:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Plain attention; queries go to the keys' basis first, values may be narrower than keys."""
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
