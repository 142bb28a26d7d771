"""Models of well-known attention geometries with random weights and few layers, and caches full of noise: for speed alone.

How long a step takes does not depend on what numbers say, so neither weights nor text of models are needed. It depends on
what a fit gives: bundles of unlike widths, first tokens in 16 bits, and, of keys with biases, means that turn.
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
from eigencache.models.live_cache.layer import CompressedLayer
from eigencache.models.live_cache.pending import pending
from eigencache.spectral.rope import Rotation

_VOCABULARY = 1024  # a head for the whole vocabulary would say nothing of the cache
_PIECE = 4096  # tokens that enter a cache at a time
_SHARED = 128  # numbers of heads that share a basis, as in a fit
_SHARES = {2.5: (1 / 16, 5 / 16, 6 / 16), 3.125: (1 / 16, 7 / 16, 7 / 16), 4.0: (2 / 16, 10 / 16, 4 / 16), 8.0: (1, 0, 0)}
_UNEVEN = {
    2.5: (1, 2, -2),
    3.125: (1, 2, -2),
    4.0: (1, 1, -2),
    8.0: (0, 0, 0),
}  # sixteenths that go from a bundle to another
Shapes = list[tuple[tuple[int, int], tuple[int, int]]]  # heads and dim of both slots of every layer


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
    """Raises `ModelError` for a geometry that there is not, and for bits that no widths are known for."""
    for name in names:
        if name not in _CONFIGS:
            raise ModelError(f"{name}: no geometry of that name: there are {', '.join(_CONFIGS)}")
    for bits in rates:
        if bits not in _SHARES:
            raise ModelError(f"{bits:g} bits: widths are known for {', '.join(f'{b:g}' for b in RATES)}")


def random_model(name: str, layers: int, positions: int, *, device: str = "cpu", dtype: torch.dtype) -> PreTrainedModel:
    """A model of that attention geometry, hidden size and feed-forward network. Raises `ModelError` for another name."""
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
    """What every layer stores, seen in a short pass."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), past_key_values=cache, use_cache=True)
    return [tuple((x.shape[1], x.shape[3]) for x in (layer.keys, layer.values)) for layer in cache.layers]  # type: ignore[union-attr, misc]


def noise_codec(
    shapes: Shapes, bits: float, dtype: torch.dtype, *, sinks: int = FIRST_EXACT, turning: bool = False, seed: int = 0
) -> LiveCodec:
    """Random bases and widths as a fit deals them out at so many bits per value, for noise of variance 1.

    Every other bundle has more bits than its neighbor. `turning`: keys have a mean in every pair that turns with their
    position, the most that a fit takes out. Raises `ModelError` for other bits than 2.5, 3.125, 4 and 8.
    """
    require_known((), [bits])
    generator = torch.Generator().manual_seed(seed)

    def heads_of(heads: int, dim: int, turns: bool = False) -> PackedHeads:
        share = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * dim <= _SHARED))
        numbers, bundles = share * dim, heads // share
        widths = tuple(_widths(bits, numbers, _sign(bundle, bundles)) for bundle in range(bundles))
        most = max(one.coefficients for one in widths)
        basis = torch.linalg.qr(torch.randn(bundles, numbers, numbers, generator=generator)).Q[:, :most]
        steps = torch.zeros(bundles, most, 1)
        for one, of_bundle in zip(steps, widths, strict=True):
            one[: of_bundle.coefficients, 0] = 6 / 2.0 ** of_bundle.per_coefficient()
        mean = torch.randn(heads, dim, generator=generator)
        rotation = Rotation(10_000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)), 1.0, "half")
        encoder = torch.where(steps > 0, basis / steps, 0.0)
        return PackedHeads(widths, encoder, basis * steps, 0 * mean, KeyMean(mean, rotation) if turns else None)

    layers = {i: (heads_of(*keys, turning), heads_of(*values)) for i, (keys, values) in enumerate(shapes)}
    return LiveCodec(f"noise · {bits:g} bits", layers, sinks, 0, dtype)


def _widths(bits: float, numbers: int, more: int) -> Widths:
    """Of a bundle of so many numbers that has `more` than its share: 1, less: -1, or just that: 0."""
    shares = [part + more * moved / 16 for part, moved in zip(_SHARES[bits], _UNEVEN[bits], strict=True)]
    return Widths(*(GROUP * round(part * numbers / GROUP) for part in shares))


def _sign(bundle: int, bundles: int) -> int:
    """Of pairs of bundles the first has more bits, the second less."""
    return 0 if bundle == bundles - 1 and bundles % 2 else 1 - 2 * (bundle % 2)


def keys_turn(model: PreTrainedModel) -> bool:
    """Whether a geometry's keys have biases, whose means a fit takes out before rotation."""
    return model.config.model_type == "qwen2"


def filled_caches(
    model: PreTrainedModel, tokens: int, batch: int, rates: Sequence[float], *, quantized: bool = True
) -> Iterator[tuple[str, Cache | str]]:
    """By name, one after the other: transformers' own caches and live ones that hold so much noise, or why there is none.

    Of MLA also a live cache that keeps everything in 16 bits: what attending to the latent itself brings.
    """
    shapes = stored_shapes(model)
    yield "DynamicCache", _filled(DynamicCache(config=model.config), shapes, tokens, batch, model)
    for backend in get_args(Backend) if quantized else ():
        name, why = f"QuantizedCache, {backend}, 4 bits", refusal(backend, model)
        yield name, why or _quantized(backend, model, shapes, tokens, batch)
    if hasattr(model.config, "kv_lora_rank"):
        held = noise_codec(shapes, rates[0], model.dtype, sinks=tokens)
        yield "live, 16 bits", _filled(CompressedCache(model, held), shapes, tokens, batch, model)
    for bits in rates:
        cache = CompressedCache(model, noise_codec(shapes, bits, model.dtype, turning=keys_turn(model)))
        yield f"live, {bits:g} bits", _filled(cache, shapes, tokens, batch, model)


def _filled(cache: Cache, shapes: Shapes, tokens: int, batch: int, model: PreTrainedModel) -> Cache:
    for layer_idx, both in enumerate(shapes):
        for at in range(0, tokens, _PIECE):
            keys, values = _noise(both, min(_PIECE, tokens - at), batch, model)
            cache.update(keys, values, layer_idx)
            layer = cache.layers[layer_idx]
            if isinstance(layer, CompressedLayer):
                pending.clear()
                layer.compact()
    return cache


def _quantized(backend: Backend, model: PreTrainedModel, shapes: Shapes, tokens: int, batch: int) -> Cache | str:
    """All at once, as a prefill gives it."""
    stored = {i: _noise(both, tokens, batch, model) for i, both in enumerate(shapes)}
    try:
        return Quantized(backend, 4).cache_of(SimpleNamespace(loaded=SimpleNamespace(model=model), stored=stored))
    except CodecError as error:
        return str(error)


def _noise(both: tuple[tuple[int, int], tuple[int, int]], tokens: int, batch: int, model: PreTrainedModel) -> list[Tensor]:
    return [torch.randn(batch, heads, tokens, dim, dtype=model.dtype, device=model.device) for heads, dim in both]
