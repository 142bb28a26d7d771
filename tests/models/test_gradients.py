"""Gradients of cached vectors do not depend on how many positions have logits at a time, and the model is left as it was."""

import copy

import pytest
import torch
from torch.nn import functional as F

from eigencache.models import gradients
from eigencache.models.gradients import cache_gradients
from eigencache.models.tapped_cache import tapped_cache
from tiny_models import tiny

NAMES = ("llama", "gpt2", "gemma2", "granite", "cohere2", "qwen3", "deepseek_v3", "llama4_text", "gemma3_text")


def whole(model, ids: torch.Tensor, mask: torch.Tensor) -> dict[int, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Return the gradients from one loss over all logits."""
    cache, stored = tapped_cache(model, track=True)
    logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum").backward()
    return {i: (keys.grad, values.grad) for i, (keys, values) in stored.items()}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_in_chunks_are_those_of_one_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, generator = copy.deepcopy(tiny(name)), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 100, (2, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    expected = whole(model, ids, mask)
    monkeypatch.setattr(gradients, "LOGITS", 2 * model.config.vocab_size * 7)  # 7 positions at a time
    found = cache_gradients(model, ids, mask)
    assert found.keys() == expected.keys() and any(g is not None for pair in expected.values() for g in pair)
    for layer_idx, pair in expected.items():
        for got, right in zip(found[layer_idx], pair, strict=True):
            right = torch.zeros_like(got) if right is None else right
            assert torch.allclose(got, right, rtol=1e-4, atol=1e-6 * float(right.abs().max().clamp_min(1.0)))


def test_the_model_is_left_as_it_was_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny("llama"))
    monkeypatch.setattr(gradients, "_loss", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        cache_gradients(model, torch.zeros(1, 8, dtype=torch.int64))
    assert "forward" not in vars(model.base_model) and all(weight.requires_grad for weight in model.parameters())
