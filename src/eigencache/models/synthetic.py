"""Synthetic models and caches for speed measurements: known attention geometries, random weights, caches of noise.

The time of a decode step does not depend on the values in weights and cache. It depends on the structure of a fitted codec,
which is reproduced here: bundles of different bit widths, sinks in 16 bits, and rotated means for keys with biases.
"""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import get_args

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DeepseekV2Config,
    DynamicCache,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.codec.live.rotated_mean import KeyMean
from eigencache.codec.sinks_and_window import FIRST_EXACT
from eigencache.errors import CodecError, ModelError
from eigencache.kernels.packed.format import GROUP, Widths
from eigencache.models.caches.hf_quantized import Backend, Quantized, refusal
from eigencache.models.live_cache.cache import CompressedCache
from eigencache.models.live_cache.pending import pending
from eigencache.spectral.rope import Rotation

_VOCABULARY = 1024  # small, because the output head is not part of the measurement
_PIECE = 4096  # tokens added to a cache at a time
_SHARED = 128  # maximum dimension of a bundle, the heads that share a basis, as in a fit
_SHARES = {2.5: (1 / 16, 5 / 16, 6 / 16), 3.125: (1 / 16, 7 / 16, 7 / 16), 4.0: (2 / 16, 10 / 16, 4 / 16), 8.0: (1, 0, 0)}
_UNEVEN = {  # sixteenths of the dimensions that move from one bundle to its neighbor
    2.5: (1, 2, -2),
    3.125: (1, 2, -2),
    4.0: (1, 1, -2),
    8.0: (0, 0, 0),
}
Shapes = list[tuple[tuple[int, int], tuple[int, int]]]  # (heads, dim) of both slots of every layer


def _llama(layers: int, positions: int) -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=layers,
        vocab_size=_VOCABULARY, max_position_embeddings=positions, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def _qwen(layers: int, positions: int) -> PreTrainedConfig:
    return Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=layers,
        vocab_size=_VOCABULARY, max_position_embeddings=positions, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def _deepseek(layers: int, positions: int) -> PreTrainedConfig:
    return DeepseekV2Config(
        hidden_size=2048, intermediate_size=10944, num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=layers,
        kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, head_dim=64,
        first_k_dense_replace=layers, vocab_size=_VOCABULARY, max_position_embeddings=positions,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


_CONFIGS: dict[str, Callable[[int, int], PreTrainedConfig]] = {
    "llama-3-8b": _llama,
    "qwen2.5-7b": _qwen,
    "deepseek-v2-lite": _deepseek,
}
GEOMETRIES = tuple(_CONFIGS)
RATES = tuple(_SHARES)


def require_known(names: Sequence[str], rates: Sequence[float]) -> None:
    """Check the names of geometries and the rates.

    Args:
        names: Names of geometries, of `GEOMETRIES`.
        rates: Bits per value, of `RATES`.

    Raises:
        ModelError: A name or rate does not exist.
    """
    for name in names:
        if name not in _CONFIGS:
            raise ModelError(f"`geometries` {name}: no such geometry. Use {', '.join(_CONFIGS)}.")
    for bits in rates:
        if bits not in _SHARES:
            available = ", ".join(f"{rate:g}" for rate in RATES)
            raise ModelError(f"`rates` {bits:g}: not available. Use {available} bits per packed value.")


def random_model(name: str, layers: int, positions: int, *, device: str = "cpu", dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with random weights and the attention geometry, hidden size and feed-forward network of a known one.

    Args:
        name: Name of a geometry, of `GEOMETRIES`.
        layers: Number of layers.
        positions: Maximum number of positions.
        device: Device of the weights.
        dtype: Dtype of the weights.

    Raises:
        ModelError: `name` does not exist.
    """
    require_known([name], ())
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(_CONFIGS[name](layers, positions), attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def stored_shapes(model: PreTrainedModel) -> Shapes:
    """Return (heads, dim) of keys and values of every layer in the cache, from a short forward pass."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), past_key_values=cache, use_cache=True)
    return [tuple((x.shape[1], x.shape[3]) for x in (layer.keys, layer.values)) for layer in cache.layers]  # type: ignore[union-attr, misc]


def noise_codec(
    shapes: Shapes, bits: float, dtype: torch.dtype, *, sinks: int = FIRST_EXACT, rotated_mean: bool = False, seed: int = 0
) -> LiveCodec:
    """Return a live codec with random bases for noise of variance 1, and bit widths like those of a fit.

    Bundles alternate between more and fewer bits than the mean.

    Args:
        shapes: (heads, dim) of keys and values of every layer.
        bits: Bits per value, of `RATES`.
        dtype: Dtype of the model.
        sinks: First tokens stored in 16 bits.
        rotated_mean: Give keys a rotated mean in every pair, the largest that a fit subtracts.
        seed: Seed of bases and means.

    Raises:
        ModelError: `bits` is not available.
    """
    require_known((), [bits])
    generator = torch.Generator().manual_seed(seed)

    def heads_of(heads: int, dim: int, rotated: bool = False) -> PackedHeads:
        share = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * dim <= _SHARED))
        numbers, bundles = share * dim, heads // share
        widths = tuple(_widths(bits, numbers, _sign(bundle, bundles)) for bundle in range(bundles))
        most = max(width.coefficients for width in widths)
        basis = torch.linalg.qr(torch.randn(bundles, numbers, numbers, generator=generator)).Q[:, :most]
        steps = torch.zeros(bundles, most, 1)
        for step, width in zip(steps, widths, strict=True):
            step[: width.coefficients, 0] = 6 / 2.0 ** width.per_coefficient()
        mean = torch.randn(heads, dim, generator=generator)
        rotation = Rotation(10_000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)), 1.0, "half")
        encoder = torch.where(steps > 0, basis / steps, 0.0)
        return PackedHeads(widths, encoder, basis * steps, 0 * mean, KeyMean(mean, rotation) if rotated else None)

    layers = {i: (heads_of(*keys, rotated_mean), heads_of(*values)) for i, (keys, values) in enumerate(shapes)}
    return LiveCodec(f"noise · {bits:g} bits", layers, sinks, 0, dtype)


def _widths(bits: float, numbers: int, more: int) -> Widths:
    """Return the widths of a bundle of dimension `numbers` with more (1), fewer (-1) or exactly (0) the mean bits."""
    shares = [part + more * moved / 16 for part, moved in zip(_SHARES[bits], _UNEVEN[bits], strict=True)]
    return Widths(*(GROUP * round(part * numbers / GROUP) for part in shares))


def _sign(bundle: int, bundles: int) -> int:
    """Return 1 for the first and -1 for the second bundle of every pair, 0 for a last one without a neighbor."""
    return 0 if bundle == bundles - 1 and bundles % 2 else 1 - 2 * (bundle % 2)


def keys_turn(model: PreTrainedModel) -> bool:
    """Return whether the keys of a model have biases, whose means a fit subtracts before rotation."""
    return model.config.model_type == "qwen2"


def filled_caches(
    model: PreTrainedModel, tokens: int, batch: int, rates: Sequence[float], *, quantized: bool = True
) -> Iterator[tuple[str, Cache | str]]:
    """Yield caches filled with noise, one after the other: caches of transformers and compressed caches.

    For MLA this includes a compressed cache with all tokens in 16 bits, which shows the effect of attending to the latent.

    Args:
        model: The model.
        tokens: Tokens per sequence.
        batch: Number of sequences.
        rates: Bits per value of the compressed caches, of `RATES`.
        quantized: Include the quantized caches of transformers.

    Yields:
        The name of a cache, and the cache or the reason why it is not available.
    """
    shapes = stored_shapes(model)
    yield "DynamicCache", _filled(DynamicCache(config=model.config), shapes, tokens, batch, model)
    for backend in get_args(Backend) if quantized else ():
        name, why = f"QuantizedCache, {backend}, 4 bits", refusal(backend, model)
        yield name, why or _quantized(backend, model, shapes, tokens, batch)
    if hasattr(model.config, "kv_lora_rank"):
        exact = noise_codec(shapes, rates[0], model.dtype, sinks=tokens)
        yield "live, 16 bits", _filled(CompressedCache(model, exact), shapes, tokens, batch, model)
    for bits in rates:
        cache = CompressedCache(model, noise_codec(shapes, bits, model.dtype, rotated_mean=keys_turn(model)))
        yield f"live, {bits:g} bits", _filled(cache, shapes, tokens, batch, model)


def _filled(cache: Cache, shapes: Shapes, tokens: int, batch: int, model: PreTrainedModel) -> Cache:
    for layer_idx, slots in enumerate(shapes):
        for start in range(0, tokens, _PIECE):
            keys, values = _noise(slots, min(_PIECE, tokens - start), batch, model)
            if isinstance(cache, CompressedCache):  # outside of a pass, its layers are filled
                layer = cache.compressed_layers[layer_idx]
                layer.update(keys, values)
                pending.clear()
                layer.compact()
            else:
                cache.update(keys, values, layer_idx)
    return cache


def _quantized(backend: Backend, model: PreTrainedModel, shapes: Shapes, tokens: int, batch: int) -> Cache | str:
    """Return a quantized cache filled at once, like by a prefill, or the reason why this is not possible."""
    stored = {i: _noise(slots, tokens, batch, model) for i, slots in enumerate(shapes)}
    try:
        return Quantized(backend, 4).cache_of(SimpleNamespace(loaded=SimpleNamespace(model=model), stored=stored))
    except CodecError as error:
        return str(error)


def _noise(slots: tuple[tuple[int, int], tuple[int, int]], tokens: int, batch: int, model: PreTrainedModel) -> list[Tensor]:
    return [torch.randn(batch, heads, tokens, dim, dtype=model.dtype, device=model.device) for heads, dim in slots]
