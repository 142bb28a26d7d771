"""Moments of queries and of attended values are those of a direct computation in float64; padding counts for nothing."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from eigencache.calibration import attention_moments
from eigencache.calibration.attention_moments import attended_moments
from eigencache.calibration.session import Session
from eigencache.corpora.sequences import Sequences
from eigencache.errors import UnsupportedArchitectureError
from eigencache.models.capture import Capture
from stub_codecs import random_sequences, tiny_loaded

MODELS = ("llama", "gpt2", "gemma2", "qwen3")  # grouped heads, none, windows, normed keys
UNEVEN = random_sequences(24, 9, 17, 24, 3, seed=2)
Moments = dict[int, Tensor]


@torch.no_grad()
def direct(name: str, text: Sequences) -> tuple[Moments, Moments]:
    """Sequence by sequence, without padding and batches, sums written out."""
    loaded = tiny_loaded(name)
    q, k, v = ({}, {}, {})
    with Capture(loaded.model, loaded.geometry, queries=True) as captured:
        for ids in text.ids:
            row = torch.from_numpy(ids)[None]
            for layer in captured.run(row, torch.ones_like(row)):
                for found, names in (
                    (q, ("queries_post_rope", "queries")),
                    (k, ("keys_post_rope", "keys")),
                    (v, ("values",)),
                ):
                    x = next(layer.tensors[one] for one in names if one in layer.tensors)[0].double()
                    found.setdefault(layer.layer_idx, []).append(x)
    queries, values = {}, {}
    for i in q:
        all_q, all_k, all_v = (torch.cat(found[i], 1) for found in (q, k, v))
        group = len(all_q) // len(all_k)
        of_heads, of_values = [], []
        for head in range(len(all_k)):
            own = all_q[head * group : (head + 1) * group].flatten(0, 1)
            moment = torch.einsum("na,nb->ab", own, own) / len(own)
            weight = torch.einsum("na,ab,nb->n", all_k[head], moment, all_k[head])
            weight = weight / weight.mean()
            of_heads.append(moment)
            of_values.append(torch.einsum("n,na,nb->ab", weight, all_v[head], all_v[head]) / len(weight))
        queries[i], values[i] = torch.stack(of_heads), torch.stack(of_values)
    return queries, values


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("name", MODELS)
def test_moments_are_those_of_a_direct_computation_and_padding_is_left_out(name: str, batch_size: int) -> None:
    found = attended_moments(
        Session(tiny_loaded(name), batch_size=batch_size),
        UNEVEN,
    )
    for mine, theirs in zip(found, direct(name, UNEVEN), strict=True):
        assert mine.keys() == theirs.keys() and mine
        for i, moment in mine.items():
            assert moment.dtype == torch.float64
            torch.testing.assert_close(moment, theirs[i], rtol=2e-4, atol=2e-5 * float(theirs[i].abs().max()))
            assert float(torch.linalg.eigvalsh(moment).min()) > -1e-9 * float(moment.diagonal(dim1=-2, dim2=-1).max())


def test_every_key_head_has_a_moment_of_its_own_and_progress_is_said() -> None:
    said: list[tuple[str, int, int]] = []
    queries, values = attended_moments(
        Session(tiny_loaded("llama"), batch_size=2, on_progress=lambda *all_: said.append(all_)),
        UNEVEN,
    )
    assert {tuple(m.shape) for m in (*queries.values(), *values.values())} == {(2, 16, 16)}
    assert not torch.allclose(queries[0][0], queries[0][1], rtol=0.1)
    assert said == [(what, done, 5) for what in ("queries", "attended values") for done in (2, 4, 5)]


def test_latents_are_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"deepseek_v2: moments of attended values .* MLA caches latents"):
        attended_moments(Session(tiny_loaded("deepseek_v2")), UNEVEN)


def test_a_layer_whose_queries_are_not_captured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(Capture):
        def run(self, input_ids: Tensor, attention_mask: Tensor | None = None):  # type: ignore[override]
            for layer in super().run(input_ids, attention_mask):
                seen = {name: x for name, x in layer.tensors.items() if "queries" not in name or layer.layer_idx != 1}
                yield SimpleNamespace(layer_idx=layer.layer_idx, tensors=seen)

    monkeypatch.setattr(attention_moments, "Capture", Blind)
    with pytest.raises(UnsupportedArchitectureError, match="llama: queries of layer 1 cannot be captured"):
        attended_moments(Session(tiny_loaded("llama")), UNEVEN)
