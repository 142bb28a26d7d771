"""Text generated from a compressed or a plain cache, with its bytes and its time."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from eigencache.errors import CorpusError
from eigencache.evaluate.prefix import check_positions
from eigencache.kernels.packed.backend import BackendName
from eigencache.models.caches.measuring_cache import plain_cache
from eigencache.models.caches.tensors import cached_of
from eigencache.models.live_cache.cache import CompressedCache
from eigencache.models.load import LoadedModel
from eigencache.records.generation import Generated


class _Stream:
    """What transformers hands tokens to: text goes on as soon as it is whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.said = ""
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """The prompt first, then every token."""
        self.times.append(perf_counter())
        if len(self.times) == 1:
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.on_text(text[len(self.said) :])
            self.said = text

    def end(self) -> None:
        """Nothing is kept back."""
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
    """Go on from `prompt` with a cache that `codec`, a `LiveCodec`, compresses, or with a plain one.

    Raises `CorpusError` for an empty prompt, `ModelError` where the model has too few positions.
    """
    ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]], device=loaded.device)
    if not ids.numel():
        raise CorpusError("the prompt has no tokens: give some text to go on from")
    check_positions(loaded, ids.shape[1] + max_new_tokens)
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
    held = cache.get_seq_length()
    return Generated(
        tokens=stream.ids,
        text=stream.said,
        prompt_tokens=ids.shape[1],
        nbytes=cache.nbytes
        if isinstance(cache, CompressedCache)
        else sum(x.nbytes for s in cached_of(cache).values() for x in s),
        sixteen_bit_nbytes=2 * loaded.geometry.values_per_token * held,
        prompt_seconds=stream.times[1] - stream.times[0],
        seconds=stream.times[-1] - stream.times[1],
        backend=_backend_of(cache),
    )


def _backend_of(cache: Any) -> str | None:
    """What reads the packed blocks of a cache; None where there are none."""
    packed = isinstance(cache, CompressedCache) and any(layer.blocks for layer in cache.compressed_layers)
    return cache.backend if packed else None


def parted_at(one: Generated, other: Generated) -> int | None:
    """After how many tokens two answers part; None where they do not."""
    pairs = zip(one.tokens, other.tokens, strict=False)
    found = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    shorter = min(len(one.tokens), len(other.tokens))
    return shorter if found is None and len(one.tokens) != len(other.tokens) else found
