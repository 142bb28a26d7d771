"""MLA as it would be without its latent: expanded keys and values, read, compressed and compared (THEORY 9).

transformers 5.17 and later cache the latent and expand the whole past at every step. Here what the expansion gives for
the past passes through codecs of the expanded keys and values, as a cache that held those would; the rotary key and
the newest tokens stay as they are.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eigencache.codec.base import to_sixteen_bit
from eigencache.errors import UnsupportedArchitectureError
from eigencache.models.load import LoadedModel
from eigencache.spectral.transform import Transform

Expanded = Mapping[tuple[int, str], list[Transform]]  # (layer, keys_nope or values) → one transform per head


@dataclass
class ExpandedBytes:
    """Bytes of the coefficients that stood for the expanded past of the last forward pass."""

    nbytes: int = 0


@contextmanager
def expanded_codec(loaded: LoadedModel, codec: Expanded, past: int) -> Iterator[ExpandedBytes]:
    """The first `past` positions of every expansion become decode(encode(·)) of 16-bit coefficients; undone afterwards.

    Keys or values that the codec does not name are kept in 16 bits and counted. Raises `UnsupportedArchitectureError`
    for a model without a latent.
    """
    held = ExpandedBytes()

    def change(layer_idx: int, output: Tensor) -> Tensor:
        layer = loaded.geometry.layers[layer_idx]
        assert layer.mla is not None
        if layer_idx == loaded.geometry.cached_layers[0]:
            held.nbytes = 0
        heads = output[..., :past, :].unflatten(-1, (layer.num_attention_heads, -1))
        nope = layer.mla.qk_nope_head_dim
        kinds = {"keys_nope": heads[..., :nope], "values": heads[..., nope:]}
        decoded = [_through(x, codec.get((layer_idx, kind)), held) for kind, x in kinds.items()]
        return torch.cat([torch.cat(decoded, -1).flatten(-2), output[..., past:, :]], -2)

    with _expansions(loaded, change):
        yield held


@contextmanager
def recorded_expansion(loaded: LoadedModel) -> Iterator[dict[int, Tensor]]:
    """What every layer expands in a forward pass, [batch, 1, seq, heads · (nope + v)]: a cache without the latent."""
    kept: dict[int, Tensor] = {}

    def change(layer_idx: int, output: Tensor) -> Tensor:
        kept[layer_idx] = output
        return output

    with _expansions(loaded, change):
        yield kept


@contextmanager
def replayed_expansion(loaded: LoadedModel, kept: Mapping[int, Tensor]) -> Iterator[None]:
    """Later passes read for the past what was recorded, and not what is expanded anew."""

    def change(layer_idx: int, output: Tensor) -> Tensor:
        past = kept[layer_idx]
        return torch.cat([past, output[..., past.shape[-2] :, :]], -2)

    with _expansions(loaded, change):
        yield


@contextmanager
def _expansions(loaded: LoadedModel, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Every layer's expanded keys and values pass through `change`; hooks are gone afterwards, also after an error."""
    if loaded.geometry.mla is None:
        raise UnsupportedArchitectureError(f"{loaded.name} has no latent to expand: it caches keys and values as they are")
    handles = []
    try:
        for module in loaded.model.modules():
            layer_idx, up = getattr(module, "layer_idx", None), getattr(module, "kv_b_proj", None)
            if isinstance(up, nn.Module) and isinstance(layer_idx, int):
                hook = lambda _module, _args, output, layer_idx=layer_idx: change(layer_idx, output)  # noqa: E731
                handles.append(up.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _through(x: Tensor, transforms: list[Transform] | None, held: ExpandedBytes) -> Tensor:
    """x [..., seq, heads, dim] from what would be held of it."""
    if transforms is None:
        kept = to_sixteen_bit(x, "expanded vectors")
        held.nbytes += kept.nbytes
        return kept.to(x.dtype)
    decoded = []
    for head, transform in enumerate(transforms):
        kept = to_sixteen_bit(transform.encode(x[..., head, :]), "coefficients")
        held.nbytes += kept.nbytes
        decoded.append(transform.decode(kept).to(x.dtype))
    return torch.stack(decoded, -2)
