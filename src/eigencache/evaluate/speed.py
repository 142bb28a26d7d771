"""How long attention, a step, a generation and a prefill take over a live cache and over its peers, side by side in one run.

All that is compared runs in turn in every repeat, and medians are reported: what slows the machine slows all alike.
Reading noise takes as long as reading text, so geometries of large models are timed with random weights and few layers.
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
_COPIED = 2**28  # bytes, more than any cache of a processor
_PRODUCT, _PRODUCT_ON_CPU = 8192, 1024  # rows of a square matrix: a CPU without 16-bit products takes minutes for more
ROUNDS = 5  # in which a generation goes on, all caches in turn
_GENERATION = 16_384  # tokens held, beyond which a whole generation takes minutes and a step says as much


def in_turn(works: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of every work, by name."""
    return {name: median(found) for name, found in seconds_in_turn(works, repeats, device).items()}


def seconds_in_turn(works: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every work, by name; in every repeat all run once, after one that does not count.

    Each time in another order: what runs before leaves the processor's caches as it needs them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    order, drawn = list(works.items()), Random(0)
    for turn in range(repeats + 1):
        for name, work in drawn.sample(order, len(order)):
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def limits(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> tuple[float, float]:
    """Bytes read in a second by a copy, and operations in a second of a product of matrices."""
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    size = _PRODUCT_ON_CPU if device.type == "cpu" else _PRODUCT
    target, x = torch.empty_like(source), torch.randn(size, size, dtype=dtype, device=device)
    found = in_turn({"copy": lambda: target.copy_(source), "product": lambda: x @ x}, repeats, device)
    return _COPIED / found["copy"], 2 * size**3 / found["product"]


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed: geometries by name, tokens held, rows of a batch, bits per value of the live caches."""

    geometries: Sequence[str] = ("llama-3-8b",)
    contexts: Sequence[int] = (1024, 4096, 16_384, 32_768)
    batches: Sequence[int] = (1,)
    rates: Sequence[float] = (3.125, 4.0)
    generated: int = 65  # tokens, from contexts up to `_GENERATION`: a block is packed in between; 0 for none
    prefill: int = 8192  # tokens; 0 for none
    chunk: int = 512  # tokens of a prompt that are read at a time, beside all at once; 0 for none
    layers: int = 1
    repeats: int = 7


@torch.no_grad()
def measure_speed(settings: SpeedSettings, device: str, dtype: torch.dtype, on_progress: Progress) -> SpeedRecord:
    """Attention of one layer, decode steps and prefills of every geometry. Raises what `require_known` raises."""
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
        read_bytes_per_second=read,
        operations_per_second=operations,
        timings=timings,
    )


def _case(model: Any, name: str, context: int, batch: int, settings: SpeedSettings) -> Iterator[Timing]:
    """Attention and a decode step over so many tokens."""
    timed = lambda part, way, **found: Timing(part=part, geometry=name, context=context, batch=batch, way=way, **found)  # noqa: E731
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
        works = {way: partial(_go_on, model, cache, batch, tokens) for way, cache in caches.items()}
        for way, seconds in seconds_in_turn(works, ROUNDS, model.device).items():
            yield timed("generation", way, seconds=sum(seconds) / (ROUNDS * tokens), nbytes=sizes[way])


def _go_on(model: Any, cache: Any, batch: int, tokens: int) -> None:
    ids = torch.zeros(batch, cache.get_seq_length() + 1, dtype=torch.int64, device=model.device)
    given = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **given)


def _attention(model: Any, caches: Mapping[str, Any]) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    """Ways of one query per row to attend to the first layer: over what `DynamicCache` holds, and live."""
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
    """How many prefills a median is of, where others are of so many."""
    return min(5, repeats)


def _prefills(model: Any, name: str, settings: SpeedSettings) -> Iterator[Timing]:
    """A prompt in one pass into an empty cache, and in chunks."""
    ids = torch.zeros(1, settings.prefill, dtype=torch.int64, device=model.device)
    codec = noise_codec(stored_shapes(model), settings.rates[0], model.dtype, turning=keys_turn(model))
    made = {
        "DynamicCache": lambda: plain_cache(model, {}),
        f"live, {settings.rates[0]:g} bits": lambda: CompressedCache(model, codec),
    }
    parts: dict[Part, int] = {"prefill": settings.prefill, "chunked prefill": settings.chunk}
    for part, chunk in parts.items():
        if not chunk:
            continue
        works = {way: partial(_read, model.model, ids, chunk, make) for way, make in made.items()}
        for way, seconds in in_turn(works, prefills(settings.repeats), model.device).items():
            yield Timing(part=part, geometry=name, context=settings.prefill, batch=1, way=way, seconds=seconds, nbytes=None)


def _read(base: Any, ids: Tensor, chunk: int, make: Callable[[], Any]) -> None:
    """A prompt into a new cache, so many tokens at a time; `base` makes no logits."""
    cache = make()
    for piece in ids.split(chunk, 1):
        base(input_ids=piece, past_key_values=cache, use_cache=True)


def cache_nbytes(cache: Any) -> int:
    """Bytes of all storages that a cache holds, whichever it is."""
    if isinstance(cache, CompressedCache):
        return cache.nbytes
    return storage_bytes(t for layer in cache.layers for t in tensors_of(vars(layer)))
