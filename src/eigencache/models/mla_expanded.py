"""Emulation of an MLA model that caches expanded keys and values instead of the latent (THEORY 9).

transformers 5.17 and later cache the latent and expand the whole past at every step. Here the expanded keys and values of
the past are encoded and decoded by a codec, as in a cache that stores them. The rotary key and the newest tokens are not
changed.
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

Expanded = Mapping[tuple[int, str], list[Transform]]  # (layer, "keys_nope" or "values") → one transform per head


@dataclass
class ExpandedBytes:
    """Bytes of the coefficients of the expanded past in the last forward pass."""

    nbytes: int = 0


@contextmanager
def expanded_codec(loaded: LoadedModel, codec: Expanded, past: int) -> Iterator[ExpandedBytes]:
    """Replace the expanded past by its decoded 16-bit coefficients while the context is open.

    Keys or values without transforms in the codec are rounded to 16 bits and counted.

    Args:
        loaded: A model with MLA.
        codec: Transforms of expanded keys and values.
        past: Number of leading positions that are encoded.

    Yields:
        The bytes of the past in the last forward pass.

    Raises:
        UnsupportedArchitectureError: The model has no latent.
    """
    stored = ExpandedBytes()

    def change(layer_idx: int, output: Tensor) -> Tensor:
        layer = loaded.geometry.layers[layer_idx]
        assert layer.mla is not None
        if layer_idx == loaded.geometry.cached_layers[0]:
            stored.nbytes = 0
        heads = output[..., :past, :].unflatten(-1, (layer.num_attention_heads, -1))
        nope = layer.mla.qk_nope_head_dim
        kinds = {"keys_nope": heads[..., :nope], "values": heads[..., nope:]}
        decoded = [_through(x, codec.get((layer_idx, kind)), stored) for kind, x in kinds.items()]
        return torch.cat([torch.cat(decoded, -1).flatten(-2), output[..., past:, :]], -2)

    with _expansions(loaded, change):
        yield stored


@contextmanager
def recorded_expansion(loaded: LoadedModel) -> Iterator[dict[int, Tensor]]:
    """Record the expanded keys and values of every layer, as a cache without the latent would store them.

    Args:
        loaded: A model with MLA.

    Yields:
        A dictionary by layer, filled by forward passes: [batch, 1, seq, heads · (nope + v)].

    Raises:
        UnsupportedArchitectureError: The model has no latent.
    """
    recorded: dict[int, Tensor] = {}

    def change(layer_idx: int, output: Tensor) -> Tensor:
        recorded[layer_idx] = output
        return output

    with _expansions(loaded, change):
        yield recorded


@contextmanager
def replayed_expansion(loaded: LoadedModel, recorded: Mapping[int, Tensor]) -> Iterator[None]:
    """Let forward passes read recorded keys and values for the past instead of expanding the latent.

    Args:
        loaded: A model with MLA.
        recorded: Expanded past by layer, from `recorded_expansion`.

    Raises:
        UnsupportedArchitectureError: The model has no latent.
    """

    def change(layer_idx: int, output: Tensor) -> Tensor:
        past = recorded[layer_idx]
        return torch.cat([past, output[..., past.shape[-2] :, :]], -2)

    with _expansions(loaded, change):
        yield


@contextmanager
def _expansions(loaded: LoadedModel, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Apply `change` to the expanded keys and values of every layer; the hooks are removed on exit."""
    if loaded.geometry.mla is None:
        raise UnsupportedArchitectureError(f"{loaded.name} has no latent to expand: use a model with MLA")
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


def _through(x: Tensor, transforms: list[Transform] | None, stored: ExpandedBytes) -> Tensor:
    """Return x [..., seq, heads, dim] encoded and decoded, and count the bytes of the coefficients."""
    if transforms is None:
        rounded = to_sixteen_bit(x, "expanded vectors")
        stored.nbytes += rounded.nbytes
        return rounded.to(x.dtype)
    decoded = []
    for head, transform in enumerate(transforms):
        coefficients = to_sixteen_bit(transform.encode(x[..., head, :]), "coefficients")
        stored.nbytes += coefficients.nbytes
        decoded.append(transform.decode(coefficients).to(x.dtype))
    return torch.stack(decoded, -2)
