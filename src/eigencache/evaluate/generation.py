"""Generate text with `CompressedCache` or an uncompressed cache, and report bytes and time."""

from collections.abc import Callable
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from eigencache.errors import CorpusError, ModelError
from eigencache.kernels.packed.backend import BackendName
from eigencache.models.caches.measuring_cache import plain_cache
from eigencache.models.caches.tensors import cached_of
from eigencache.models.live_cache.cache import CompressedCache
from eigencache.models.load import LoadedModel
from eigencache.records.generation import Generated


class _Stream:
    """Streamer for transformers that passes text on as soon as its characters are complete."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.said = ""
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Receive the prompt on the first call, then one token per call."""
        self.times.append(perf_counter())
        if len(self.times) == 1:
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.on_text(text[len(self.said) :])
            self.said = text

    def end(self) -> None:
        """Pass on the remaining text."""
        text = str(self.tokenizer.decode(self.ids))
        self.on_text(text[len(self.said) :])
        self.said = text


@torch.no_grad()
def generate_text(
    loaded: LoadedModel,
    prompt: str,
    codec: Any | None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    backend: BackendName | None = None,
    on_text: Callable[[str], None] = lambda _: None,
) -> Generated:
    """Generate text after a prompt.

    Args:
        loaded: Model and tokenizer.
        prompt: Prompt text.
        codec: A `LiveCodec`, or None for an uncompressed cache.
        max_new_tokens: Most tokens to generate.
        temperature: Sampling temperature. 0 decodes greedily.
        seed: Seed of the sampling.
        backend: Backend for attention on packed blocks. Default: chosen automatically.
        on_text: Called with each new piece of text.

    Raises:
        CorpusError: The prompt has no tokens.
        ModelError: The model has too few positions.
    """
    ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]], device=loaded.device)
    if not ids.numel():
        raise CorpusError("the prompt has no tokens. Use a non-empty text.")
    prompt_tokens, room = ids.shape[1], loaded.learned_positions
    if room and prompt_tokens + max_new_tokens > room:
        raise ModelError(
            f"the prompt has {prompt_tokens:,} tokens and `max_new_tokens` is {max_new_tokens:,}, but {loaded.name} has "
            f"{room:,} positions. Shorten the prompt or lower `max_new_tokens`."
        )
    cache = plain_cache(loaded.model, {}) if codec is None else CompressedCache(loaded.model, codec, backend=backend)
    stream = _Stream(loaded.tokenizer, on_text)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    loaded.model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        streamer=stream,
        max_new_tokens=max_new_tokens,
        num_beams=1,
        pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id or 0,
        **sampling,
    )
    cached_tokens = cache.get_seq_length()
    return Generated(
        tokens=stream.ids,
        text=stream.said,
        prompt_tokens=prompt_tokens,
        nbytes=cache.nbytes
        if isinstance(cache, CompressedCache)
        else sum(x.nbytes for s in cached_of(cache).values() for x in s),
        sixteen_bit_nbytes=2 * loaded.geometry.values_per_token * cached_tokens,
        prompt_seconds=stream.times[1] - stream.times[0],
        step_seconds=median(steps) if (steps := [b - a for a, b in pairwise(stream.times[1:])]) else None,
        backend=_backend_of(cache),
        side_nbytes=0 if codec is None else codec.nbytes,
    )


def _backend_of(cache: Any) -> str | None:
    """Return the backend that reads the packed blocks of a cache, or None if there are no blocks."""
    packed = isinstance(cache, CompressedCache) and any(layer.blocks for layer in cache.compressed_layers)
    return cache.backend if packed else None


def parted_at(first: Generated, second: Generated) -> int | None:
    """Return the number of leading tokens that two answers share, or None if the answers are equal."""
    pairs = zip(first.tokens, second.tokens, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    shorter = min(len(first.tokens), len(second.tokens))
    return shorter if position is None and len(first.tokens) != len(second.tokens) else position
