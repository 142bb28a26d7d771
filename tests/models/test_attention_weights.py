"""The attention weights of a pass are those of the model's own eager attention, and of a computation in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eager_attention import eager_weights
from eigencache.models import attention_weights as subject
from eigencache.models.attention_weights import AttentionWeights, attention_weights
from tiny_models import tiny, token_ids

LENGTH, PADDED = 24, 15  # tokens of the first row and of the second
# Grouped heads, no rotation, soft caps and windows, sink logits, its own scaling, chunks, windows, latents, a top-k mask.
MODELS = ("llama", "gpt2", "gemma2", "gpt_oss", "granite", "llama4_text", "mistral", "deepseek_v2", "deepseek_v32")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("logits", [2**22, 2**10])
@torch.no_grad()
def test_the_weights_are_those_of_eager_attention_and_the_pass_is_the_same(name, logits, monkeypatch) -> None:
    monkeypatch.setattr(subject, "_LOGITS", logits)
    model, ids = tiny(name), token_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, PADDED:] = 0
    wanted, before = model.base_model(input_ids=ids, attention_mask=mask), model.config._attn_implementation
    chunks: dict[int, list[AttentionWeights]] = {}
    with attention_weights(model, lambda chunk: chunks.setdefault(chunk.layer_idx, []).append(chunk)):
        found = model.base_model(input_ids=ids, attention_mask=mask)
    assert model.config._attn_implementation == before
    tokens = mask.bool()
    torch.testing.assert_close(found[0][tokens], wanted[0][tokens], rtol=1e-4, atol=2e-5)
    eager = eager_weights(model, ids, mask)
    assert chunks.keys() == eager.keys() == set(range(model.config.num_hidden_layers))
    for layer_idx, parts in chunks.items():
        assert (len(parts) > 1) == (logits < 2**22)
        starts = [part.start for part in parts]
        assert starts == np.cumsum([0, *(part.weights.shape[2] for part in parts)])[:-1].tolist()
        weights = torch.cat([part.weights for part in parts], 2)
        rows = tokens[:, None].expand(-1, weights.shape[1], -1)
        torch.testing.assert_close(weights[rows], eager[layer_idx][rows], rtol=1e-4, atol=2e-6)
        visible = torch.cat([part.visible.expand(2, -1, -1, -1) for part in parts], 2).expand_as(weights)
        assert bool((weights[rows][~visible[rows]] == 0).all()) and not visible[1, :, :, PADDED:].any()


@pytest.mark.parametrize(
    ("softcap", "window", "sinks"), [(None, None, False), (3.0, None, False), (None, 5, False), (2.0, 7, True)]
)
def test_planted_queries_and_keys_agree_with_numpy(softcap, window, sinks) -> None:
    heads, kv_heads, seq, dim, scaling = 6, 2, 19, 8, 0.7
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, h, seq, dim, generator=generator) for h in (heads, kv_heads, kv_heads))
    aux = torch.randn(heads, generator=generator) if sinks else None
    causal = np.tril(np.ones((seq, seq), bool)) & ~np.tril(np.ones((seq, seq), bool), -(window or seq))
    allowed = np.stack([causal, causal & (np.arange(seq) < 12)])  # the second row is padded after 12 tokens
    heard: list[AttentionWeights] = []
    with attention_weights(tiny("llama"), heard.append):
        mask = torch.from_numpy(allowed)[:, None]
        output, _ = subject._attention(
            SimpleNamespace(layer_idx=3), q, k, v, mask, scaling=scaling, softcap=softcap, s_aux=aux
        )
    (chunk,) = heard
    assert (chunk.layer_idx, chunk.start, chunk.kv_heads) == (3, 0, kv_heads)
    for row in range(2):
        for head in range(heads):
            group = head // (heads // kv_heads)
            logits = q[row, head].double().numpy() @ k[row, group].double().numpy().T * scaling
            if softcap:
                logits = softcap * np.tanh(logits / softcap)
            weights = np.exp(logits) * allowed[row]
            total = weights.sum(1, keepdims=True) + (np.exp(float(aux[head])) if sinks else 0.0)
            weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
            np.testing.assert_allclose(chunk.weights[row, head].numpy(), weights, rtol=1e-4, atol=1e-7)
            expected = weights @ v[row, group].double().numpy()
            np.testing.assert_allclose(output[row, :, head].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_the_interface_runs_unchanged_and_is_not_heard() -> None:
    model, ids = tiny("bloom"), token_ids()
    with torch.no_grad():
        wanted = model.base_model(input_ids=ids)[0]
        with attention_weights(model, lambda chunk: pytest.fail("heard")):
            assert torch.equal(model.base_model(input_ids=ids)[0], wanted)


def test_attention_is_restored_after_an_error() -> None:
    model = tiny("llama")
    before = model.config._attn_implementation
    with pytest.raises(KeyError, match="planted"), attention_weights(model, lambda chunk: None):
        assert model.config._attn_implementation == subject.NAME
        raise KeyError("planted")
    assert model.config._attn_implementation == before
    model.base_model(input_ids=token_ids())
