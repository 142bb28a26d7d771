"""On a GPU, or in Triton's interpreter, a compressed cache gives the logits that plain PyTorch gives over it."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'eigencache[triton]'")

from eigencache.kernels.packed.backend import REFERENCE, PackedBackend, triton_backend
from eigencache.models.live_cache.cache import CompressedCache
from live_codecs import fine_codec, long_ids, long_model, with_means
from triton_process import DEVICE, Run, triton_process

pytestmark = pytest.mark.slow

PADS, PIECES = (0, 70), (150, 10, 1)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with triton_process() as call:
        yield call


@torch.no_grad()
def logits_by(name: str, backend: PackedBackend) -> tuple[Tensor, int]:
    """Return the logits of a text read in pieces through a compressed cache, and the number of attention calls."""
    model, ids = deepcopy(long_model(name)).to(DEVICE), long_ids(batch=2, length=sum(PIECES)).to(DEVICE)
    codec = with_means(model) if name in ("qwen2", "deepseek_v2") else fine_codec(model, sinks=2)
    mask = torch.ones_like(ids)
    for row, count in enumerate(PADS):
        mask[row, :count] = 0
    cache, found, start, calls = CompressedCache(model, codec), [], 0, []
    attention = backend.attention
    counted = attention and replace(backend, attention=lambda *given: calls.append(1) or attention(*given))
    with (
        patch("eigencache.models.live_cache.block_attention.packed_backend", lambda *_: counted or backend),
        patch("eigencache.codec.live.packed_heads.packed_backend", lambda *_: backend),
    ):
        for length in PIECES:
            stop = start + length
            positions = (mask[:, :stop].cumsum(-1) - 1).clamp_min(0)[:, start:]
            given = {"attention_mask": mask[:, :stop], "position_ids": positions, "past_key_values": cache}
            found.append(model(input_ids=ids[:, start:stop], use_cache=True, **given).logits)
            start = stop
    return (torch.cat(found, 1) * mask[..., None]).cpu(), len(calls)


def both(name: str) -> tuple[float, int]:
    """Return the relative distance of both backends' logits, and the number of Triton's attention calls."""
    found, calls = logits_by(name, triton_backend(DEVICE))
    right, _ = logits_by(name, REFERENCE)
    return float((found - right).square().mean().sqrt() / right.std()), calls


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v2", "qwen2"])
def test_the_kernels_serve_prompts_padding_windows_caps_means_and_latents(run, name: str) -> None:
    apart, calls = run(both, name)
    assert apart < 3e-3  # numbers may be rounded the other way
    assert calls
