"""`generate`: generate text with a compressed cache; `speed`: time `CompressedCache` and other caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eigencache.api.codec import CacheCodec
from eigencache.api.opening import opened
from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.saved.folder import SavedCodec, load_live
from eigencache.errors import CodecError, CorpusError, ModelError
from eigencache.evaluate.generation import generate_text
from eigencache.evaluate.speed import SpeedSettings, measure_speed
from eigencache.inputs import several
from eigencache.models.codec_check import check_belongs
from eigencache.models.load import LoadedModel, check_device
from eigencache.progress import Progress, silent
from eigencache.records.generation import Generated
from eigencache.records.speed import SpeedRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def generate(
    model: str | PreTrainedModel | LoadedModel,
    prompt: str,
    codec: CacheCodec | LiveCodec | SavedCodec | str | Path | None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    on_text: Callable[[str], None] = lambda _: None,
) -> Generated:
    """Generate text with a compressed cache, and measure its bytes and its time.

    Args:
        model: a name or folder, what `eigencache.models.load.load` returns, or a loaded model, which needs its `tokenizer`.
        prompt: the text to continue.
        codec: a live codec, what `fit(..., live=True)` or `load_live` returned, a folder, or None for the plain cache.
        tokenizer: a tokenizer, or the name of one.
        max_new_tokens: tokens to generate at most, 1 or more.
        temperature: sampling temperature, 0.01 or more; 0 takes the likeliest token.
        backend: backend that reads packed blocks; None for the fastest.
        device: device to load a model to.
        dtype: number format to load a model in.
        seed: seed of sampling.
        on_text: called with every piece of text as it is generated.

    Returns:
        The generated tokens and text, the bytes of the cache, and the times of the prompt and of a token.

    Raises:
        CodecError: the codec is of another model, or there is no live codec.
        CorpusError: the prompt is empty, or `temperature` or `max_new_tokens` is out of range.
        ModelError: the model cannot be loaded, or has too few positions.
    """
    if temperature != 0 and not temperature >= 0.01:  # NaN included
        raise CorpusError(f"`temperature` is {temperature:g}. Use 0, or 0.01 or more.")
    if max_new_tokens < 1:
        raise CorpusError(f"`max_new_tokens` is {max_new_tokens}. Use 1 or more.")
    if isinstance(codec, CacheCodec) and codec.live is None:
        raise CodecError("this codec has no live part: fit one with `live`")
    saved = load_live(codec) if isinstance(codec, str | Path) else codec if isinstance(codec, SavedCodec) else None
    with opened(model, tokenizer, device=device, dtype=dtype) as session:
        if saved is not None:
            check_belongs(saved, session.loaded)
        live: Any = saved.codec if saved is not None else codec.live if isinstance(codec, CacheCodec) else codec
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "backend": backend}
        return generate_text(session.loaded, prompt, live, on_text=on_text, **options)  # type: ignore[arg-type]


def speed(
    geometries: Sequence[str] = ("llama-3-8b",),
    *,
    contexts: Sequence[int] = (1024, 4096, 16_384, 32_768),
    batches: Sequence[int] = (1,),
    rates: Sequence[float] = (3.125, 4.0),
    generated: int = 65,
    prefill: int = 8192,
    chunk: int = 512,
    layers: int = 1,
    repeats: int = 7,
    device: str | None = None,
    dtype: str = "bfloat16",
    on_progress: Progress = silent,
) -> SpeedRecord:
    """Time `CompressedCache` and other caches on attention geometries of large models, with random weights.

    Args:
        geometries: names from `eigencache.models.synthetic.GEOMETRIES`.
        contexts: tokens held by the cache.
        batches: sequences at a time.
        rates: bits per packed value: 2.5, 3.125, 4 or 8.
        generated: tokens of a whole generation; 0 for none.
        prefill: tokens of a prompt; 0 for none.
        chunk: tokens of the prompt to read at a time in the chunked prefill; 0 for none.
        layers: layers of the model.
        repeats: timed repetitions; the median is reported.
        device: the one device to time on, such as `cpu` or `cuda`. Default: `cuda` if available, otherwise `cpu`.
        dtype: number format of the model.
        on_progress: called with the name of the work, the units done and the units in all.

    Returns:
        All timings, with the speed limits of the device.

    Raises:
        ModelError: unknown geometry, rate, device or dtype, or `device` is `auto`.
        CorpusError: a context or batch below 1.
    """
    geometries, contexts, batches, rates = (several(one) for one in (geometries, contexts, batches, rates))
    if device == "auto":
        raise ModelError("`device` auto: a timing runs on one device. Use cpu or cuda.")
    if dtype not in _DTYPES:
        raise ModelError(f"`dtype` {dtype}: choose one of {', '.join(_DTYPES)}")
    for name, numbers in (("contexts", contexts), ("batches", batches)):
        if min(numbers) < 1:
            raise CorpusError(f"`{name}` {min(numbers)}: must be 1 or more")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    settings = SpeedSettings(
        geometries=geometries,
        contexts=tuple(contexts),
        batches=tuple(batches),
        rates=tuple(rates),
        generated=generated,
        prefill=prefill,
        chunk=chunk,
        layers=layers,
        repeats=repeats,
    )
    return measure_speed(settings, device, _DTYPES[dtype], on_progress)
