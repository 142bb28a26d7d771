"""Live codecs with almost no loss, and a cache that unpacks the same bytes for plain attention."""

import copy
import functools
import sys
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.codec.live.rotated_mean import KeyMean
from eigencache.geometry import geometry_from_config
from eigencache.kernels.packed.format import GROUP, Widths
from eigencache.models.live_cache.cache import CompressedCache
from eigencache.models.live_cache.layer import CompressedLayer
from eigencache.models.live_cache.pending import pending
from eigencache.models.load import LoadedModel
from eigencache.models.rope_detection import rotations_of
from tiny_models import VOCAB, tiny

LONG = 208  # three blocks and a part of one


@functools.cache
def long_model(name: str) -> PreTrainedModel:
    """Return a copy of a tiny model with learned positions for 256 tokens, whose attention a test may replace."""
    model = copy.deepcopy(tiny(name))
    positions = model.config.max_position_embeddings
    for child in model.modules():
        learned = isinstance(child, nn.Embedding) and child.num_embeddings in (positions, positions + 2)
        if learned and child is not model.get_input_embeddings():
            more = child.weight.repeat(5, 1)[: 256 + child.num_embeddings - positions]  # type: ignore[operator]
            child.weight, child.num_embeddings = nn.Parameter(more.detach()), len(more)
        if isinstance(table := getattr(child, "embed_positions", None), torch.Tensor):  # rotations by position
            make = sys.modules[type(child).__module__].create_sinusoidal_positions
            child.embed_positions = make(256, table.shape[1])
    return model


def long_ids(batch: int = 2, length: int = LONG, seed: int = 5) -> torch.Tensor:
    """Return random token ids without the lowest ones."""
    return torch.randint(4, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def cached_by(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    """Return a plain cache after a pass over the ids."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def fine_codec(model: PreTrainedModel, *, sinks: int = 0, window: int = 0, bundled: bool = False) -> LiveCodec:
    """Return a codec with 8 bits over the range of every number; `bundled`: all heads of a layer share a basis."""
    cache = cached_by(model, long_ids(4, 256, seed=6))
    layers = {}
    for layer_idx, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is not None and layer.keys.numel():
            layers[layer_idx] = (_heads(layer.keys, bundled), _heads(layer.values, bundled))
    return LiveCodec("fine", layers, sinks, window, model.dtype)


def with_means(model: PreTrainedModel) -> LiveCodec:
    """Return `fine_codec` with a random rotated mean in the second layer, of keys or of MLA's rotary key."""
    codec = fine_codec(model)
    rotation = rotations_of(LoadedModel("own", model, None, geometry_from_config(model.config)))[1]  # type: ignore[arg-type]
    both = list(codec.layers[1])
    slot = 1 if hasattr(model.config, "kv_lora_rank") else 0
    mean = torch.randn(both[slot].mean.shape, generator=torch.Generator().manual_seed(0))
    both[slot] = replace(both[slot], rotated_mean=KeyMean(mean, rotation))
    return replace(codec, layers=codec.layers | {1: (both[0], both[1])})


def rotated_mean_codec(model: PreTrainedModel) -> LiveCodec:
    """Return a codec that subtracts key biases as rotated means, with 8 bits over the range of every number."""
    rotations = rotations_of(LoadedModel("own", model, None, geometry_from_config(model.config)))  # type: ignore[arg-type]
    ids, layers = long_ids(4, 256, seed=6), {}
    for layer_idx, layer in enumerate(cached_by(model, ids).layers):
        keys, values = layer.keys, layer.values  # type: ignore[union-attr]
        bias = model.get_submodule(f"model.layers.{layer_idx}.self_attn.k_proj").bias
        key_mean = KeyMean(bias.detach().float().view(keys.shape[1], -1), rotations[layer_idx])  # type: ignore[union-attr, operator]
        seen = torch.arange(256 - keys.shape[2], 256)[None]  # the last positions in a sliding window
        heads = _heads(keys - key_mean.rotated_to(seen), False, room=2)  # `room` for the same tokens at other positions
        layers[layer_idx] = replace(heads, rotated_mean=key_mean), _heads(values, False)
    return LiveCodec("rotated mean", layers, 0, 0, model.dtype)


def _heads(x: torch.Tensor, bundled: bool, room: float = 1) -> PackedHeads:
    x = x.float()
    low, high = x.amin((0, 2)), x.amax((0, 2))
    step = (room * (high - low) / 250).clamp_min(1e-6)  # [heads, dim]
    bundles = 1 if bundled else len(step)
    step = step.reshape(bundles, -1)
    width = -(-step.shape[1] // GROUP) * GROUP
    padded = lambda diagonal: F.pad(diagonal, (0, 0, 0, width - step.shape[1]))  # noqa: E731 - used twice
    encoder, decoder = padded(torch.diag_embed(1 / step)), padded(torch.diag_embed(step))
    return PackedHeads((Widths(width, 0, 0),) * bundles, encoder, decoder, (low + high) / 2)


class _Unpacked(CompressedLayer):
    """A `CompressedLayer` whose `update` returns all tokens unpacked."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        windows = super().update(key_states, value_states)
        pending.clear()  # plain attention reads the returned tokens
        self.entered = 0
        positions, found = self.positions(0, self.blocks), []
        for slot, (heads, window) in enumerate(zip(self.heads, windows, strict=True)):
            sinks = [window.new_zeros(*window.shape[:2], self.led, window.shape[3])]  # filled below
            packed = [chunk.slot(slot) for chunk in self.chunks]
            blocks = [heads.decode(torch.cat(packed, 1), positions).to(window.dtype)] if packed else []
            whole = torch.cat([*sinks, *blocks, window], 2)
            for row, sink in self._sink_slots():
                at = int(self.sinks.slots[row, sink]) - self.dropped
                whole[row, :, at] = (self.sinks.keys, self.sinks.values)[slot][row, :, sink].to(whole.dtype)
            found.append(whole)
        return found[0], found[1]

    def _sink_slots(self) -> list[tuple[int, int]]:
        """Return row and index of every stored sink."""
        if self.sinks is None:
            return []
        held = (self.sinks.slots < self.sinks.seen) & (self.sinks.slots >= self.dropped)
        return [(row, sink) for row, sink in held.nonzero().tolist()]


def unpacked_cache(model: PreTrainedModel, codec: LiveCodec) -> CompressedCache:
    """Return a `CompressedCache` that unpacks for plain attention; call `compact` of its layers after every pass."""
    cache = CompressedCache(model, codec)
    for layer in cache.compressed_layers:
        layer.__class__ = _Unpacked
    return cache


def random_layer(heads: int, dim: int) -> CompressedLayer:
    """Return a layer without a cache, with 4-bit coefficients."""
    basis = torch.eye(dim).expand(heads, -1, -1).clone()
    both = [PackedHeads((Widths(0, dim, 0),) * heads, basis, basis, torch.zeros(heads, dim)) for _ in range(2)]
    return CompressedLayer(0, (both[0], both[1]), 0, 0, None)
