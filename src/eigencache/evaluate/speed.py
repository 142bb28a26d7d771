"""Time attention, decode steps, generation and prefill with `CompressedCache` and with the caches of transformers.

Every repetition runs all caches once, in random order, and medians are reported, so that a slower machine affects all
caches alike. Speed does not depend on the weights: the geometries of large models are timed with random weights and
few layers.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from eigencache.codec.base import storage_bytes
from eigencache.kernels.packed.backend import packed_backend
from eigencache.models.caches.measuring_cache import plain_cache
from eigencache.models.caches.tensors import tensors_of
from eigencache.models.live_cache.attention import attend
from eigencache.models.live_cache.cache import CompressedCache
from eigencache.models.synthetic import filled_caches, keys_turn, noise_codec, random_model, require_known, stored_shapes
from eigencache.records.provenance import Stopwatch
from eigencache.records.speed import Part, SpeedRecord, Timing

Progress = Callable[[str, int, int], None]
_COPIED = 2**28  # bytes; exceeds every processor cache
_PRODUCT, _PRODUCT_ON_CPU = 8192, 1024  # rows of a square matrix; larger ones take minutes on CPUs without 16-bit products
ROUNDS = 5  # rounds of a generation; in each, every cache generates once
_GENERATION = 16_384  # tokens; beyond this context a generation takes minutes and tells no more than one decode step


def in_turn(works: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each function; see `seconds_in_turn`.

    Args:
        works: Functions to time, by name.
        repeats: Timed repetitions.
        device: Device that is synchronized before and after each call.
    """
    return {name: median(seconds) for name, seconds in seconds_in_turn(works, repeats, device).items()}


def seconds_in_turn(works: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each repetition of each function.

    Each repetition calls every function once, in a new random order, because each call leaves its own data in the
    processor's caches. One untimed warm-up repetition comes first.

    Args:
        works: Functions to time, by name.
        repeats: Timed repetitions.
        device: Device that is synchronized before and after each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    items, rng = list(works.items()), Random(0)
    for repeat in range(repeats + 1):
        for name, work in rng.sample(items, len(items)):
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def limits(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> tuple[float, float]:
    """Measure the speed limits of a device for a roofline.

    Args:
        device: Device to measure.
        dtype: Dtype of the matrix product.
        repeats: Timed repetitions; the median is used.

    Returns:
        Bytes read per second by a copy, and operations per second of a matrix product.
    """
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    size = _PRODUCT_ON_CPU if device.type == "cpu" else _PRODUCT
    target, x = torch.empty_like(source), torch.randn(size, size, dtype=dtype, device=device)
    seconds = in_turn({"copy": lambda: target.copy_(source), "product": lambda: x @ x}, repeats, device)
    return _COPIED / seconds["copy"], 2 * size**3 / seconds["product"]


@dataclass(frozen=True)
class SpeedSettings:
    """Geometries, context lengths and caches to time.

    Args:
        geometries: Names of model geometries (`models.synthetic`).
        contexts: Context lengths in tokens.
        batches: Batch sizes.
        rates: Bits per value of the compressed caches.
        generated: Tokens to generate, at contexts up to 16,384 tokens. The default of 65 includes the packing of one
            block of 64. 0 skips generation.
        prefill: Prompt length in tokens. 0 skips prefills.
        chunk: Tokens per chunk of the chunked prefill. 0 skips it.
        layers: Layers of each model.
        repeats: Timed repetitions per measurement; the median is reported.
    """

    geometries: Sequence[str] = ("llama-3-8b",)
    contexts: Sequence[int] = (1024, 4096, 16_384, 32_768)
    batches: Sequence[int] = (1,)
    rates: Sequence[float] = (3.125, 4.0)
    generated: int = 65
    prefill: int = 8192
    chunk: int = 512
    layers: int = 1
    repeats: int = 7


@torch.no_grad()
def measure_speed(settings: SpeedSettings, device: str, dtype: torch.dtype, on_progress: Progress) -> SpeedRecord:
    """Time attention of one layer, decode steps, generation and prefills of every geometry.

    Args:
        settings: Geometries, context lengths and caches to time.
        device: Device to run on, such as `cpu` or `cuda`.
        dtype: Dtype of the models and of uncompressed caches.
        on_progress: Called with a geometry's name, finished cases and the number of cases.

    Returns:
        All timings, with the speed limits of the device.

    Raises:
        ModelError: A geometry or rate is unknown (`require_known`).
    """
    require_known(settings.geometries, settings.rates)
    watch, timings = Stopwatch(), []
    most = max((*settings.contexts, settings.prefill)) + 512
    read, operations = limits(torch.device(device), dtype)
    for name in settings.geometries:
        model = random_model(name, settings.layers, most, device=device, dtype=dtype)
        cases = [(context, batch) for context in settings.contexts for batch in settings.batches]
        for done, (context, batch) in enumerate(cases):
            on_progress(name, done, len(cases))
            timings += _case(model, name, context, batch, settings)
        on_progress(name, len(cases), len(cases))
        if settings.prefill:
            timings += _prefills(model, name, settings)
    query = torch.empty(1, 1, 1, 1, device=device, dtype=dtype)
    return SpeedRecord(
        run=watch.run(0, {"threads": torch.get_num_threads()}),
        device=torch.cuda.get_device_name() if query.is_cuda else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        backend=packed_backend(query, 1).name,
        layers=settings.layers,
        chunk=settings.chunk,
        repeats=settings.repeats,
        generation_rounds=ROUNDS,
        prefill_repeats=prefills(settings.repeats),
        read_bytes_per_second=read,
        operations_per_second=operations,
        timings=timings,
    )


def _case(model: Any, name: str, context: int, batch: int, settings: SpeedSettings) -> Iterator[Timing]:
    """Time attention, a decode step and a generation with every cache after `context` tokens."""
    timed = lambda part, way, **fields: Timing(part=part, geometry=name, context=context, batch=batch, way=way, **fields)  # noqa: E731
    caches, refused = {}, {}
    for way, cache in filled_caches(model, context, batch, settings.rates):
        (refused if isinstance(cache, str) else caches)[way] = cache
    if not hasattr(model.config, "kv_lora_rank"):
        works, nbytes = _attention(model, caches)
        dim = caches["DynamicCache"].layers[0].keys.shape[3]
        count = 4 * batch * context * model.config.num_attention_heads * dim
        for way, seconds in in_turn(works, settings.repeats, model.device).items():
            yield timed("attention", way, seconds=seconds, nbytes=nbytes[way], operations=count)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    sizes = {way: cache_nbytes(cache) for way, cache in caches.items()}
    step = lambda cache: model(input_ids=token, past_key_values=cache, use_cache=True)  # noqa: E731
    steps = {way: lambda cache=cache: step(cache) for way, cache in caches.items()}
    for way, seconds in in_turn(steps, settings.repeats, model.device).items():
        yield timed("decode", way, seconds=seconds, nbytes=sizes[way])
    for way, why in refused.items():
        yield timed("decode", way, seconds=None, nbytes=None, why=why)
    if settings.generated and context <= _GENERATION:
        tokens = -(-settings.generated // ROUNDS)
        works = {way: partial(_generate, model, cache, batch, tokens) for way, cache in caches.items()}
        for way, seconds in seconds_in_turn(works, ROUNDS, model.device).items():
            yield timed("generation", way, seconds=sum(seconds) / (ROUNDS * tokens), nbytes=sizes[way])


def _generate(model: Any, cache: Any, batch: int, tokens: int) -> None:
    """Generate exactly `tokens` tokens after those in `cache`."""
    ids = torch.zeros(batch, cache.get_seq_length() + 1, dtype=torch.int64, device=model.device)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)


def _attention(model: Any, caches: Mapping[str, Any]) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    """Return functions that attend to the first layer with one query per row, and the bytes each one reads."""
    plain = caches["DynamicCache"].layers[0]
    keys, values = plain.keys, plain.values
    batch, kv_heads, _, dim = keys.shape
    q = torch.randn(batch, model.config.num_attention_heads, 1, dim, dtype=keys.dtype, device=keys.device)
    rows = q.view(batch, kv_heads, -1, dim)
    works: dict[str, Callable[[], Tensor]] = {
        "SDPA, enable_gqa": lambda: F.scaled_dot_product_attention(q, keys, values, enable_gqa=True),
        "SDPA, queries as rows": lambda: F.scaled_dot_product_attention(rows, keys, values),
        "products and softmax": lambda: ((rows @ keys.mT) * dim**-0.5).float().softmax(-1).to(q.dtype) @ values,
    }
    if q.is_cuda:
        works["flash SDPA, enable_gqa"] = lambda: _flash(q, keys, values)
    nbytes = dict.fromkeys(works, int(keys.nbytes + values.nbytes))
    new = keys[:, :, -1:]
    module = model.model.layers[0].self_attn
    for way, cache in caches.items():
        if isinstance(cache, CompressedCache):
            layer = cache.compressed_layers[0]
            works[way] = lambda layer=layer: attend(module, layer, q, new, new)
            nbytes[way] = layer.nbytes
    return works, nbytes


def _flash(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)


def prefills(repeats: int) -> int:
    """Return the number of timed prefills where other measurements are repeated `repeats` times: at most 5."""
    return min(5, repeats)


def _prefills(model: Any, name: str, settings: SpeedSettings) -> Iterator[Timing]:
    """Time reading a prompt into an empty cache, in one pass and in chunks."""
    ids = torch.zeros(1, settings.prefill, dtype=torch.int64, device=model.device)
    codec = noise_codec(stored_shapes(model), settings.rates[0], model.dtype, rotated_mean=keys_turn(model))
    makers = {
        "DynamicCache": lambda: plain_cache(model, {}),
        f"live, {settings.rates[0]:g} bits": lambda: CompressedCache(model, codec),
    }
    parts: dict[Part, int] = {"prefill": settings.prefill, "chunked prefill": settings.chunk}
    for part, chunk in parts.items():
        if not chunk:
            continue
        works = {way: partial(_read, model.model, ids, chunk, make) for way, make in makers.items()}
        for way, seconds in in_turn(works, prefills(settings.repeats), model.device).items():
            yield Timing(part=part, geometry=name, context=settings.prefill, batch=1, way=way, seconds=seconds, nbytes=None)


def _read(base: Any, ids: Tensor, chunk: int, make: Callable[[], Any]) -> None:
    """Read a prompt into a new cache, `chunk` tokens at a time; `base` is the model without its head for logits."""
    cache = make()
    for piece in ids.split(chunk, 1):
        base(input_ids=piece, past_key_values=cache, use_cache=True)


def cache_nbytes(cache: Any) -> int:
    """Return the bytes of all tensor storages of a cache of any class."""
    if isinstance(cache, CompressedCache):
        return cache.nbytes
    return storage_bytes(t for layer in cache.layers for t in tensors_of(vars(layer)))
