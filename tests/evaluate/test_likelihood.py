"""Scores come from the cache: identity changes nothing, zeros ruin, noise grows, and the pieces add up to the text."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from eigencache.calibration.session import Session
from eigencache.codec.base import Encoded, SixteenBit
from eigencache.errors import CorpusError, ModelError, NonFiniteError, UnsupportedArchitectureError
from eigencache.evaluate.likelihood import UNCOMPRESSED, compared, pieces, score_through_cache, scored_batches
from eigencache.evaluate.summary import paired_interval, summarize
from eigencache.records.quality import ReadingProtocol, SequenceLoss
from stub_codecs import Identity, NaNs, Zeros, random_sequences, tiny_loaded

pytestmark = pytest.mark.versions

PROTOCOLS = [
    ReadingProtocol(kind="prefix", length=12),
    ReadingProtocol(kind="prefix", length=12, step=5),
    ReadingProtocol(kind="chunked", length=5),
    ReadingProtocol(kind="chunked", length=6, window=4, block=3),
]
MODELS = ("gpt2", "llama", "gemma3_text", "deepseek_v2", "qwen3_next")


@dataclass(frozen=True)
class Noise(Identity):
    """The cache with Gaussian noise of `share` of its own standard deviation, always the same noise."""

    share: float = 0.1
    name: str = "noise"

    def decode(self, encoded: Encoded):
        generator = torch.Generator().manual_seed(encoded.start)
        noisy = lambda x: x + self.share * x.std() * torch.randn(x.shape, generator=generator)  # noqa: E731
        return {i: (noisy(k), noisy(v)) for i, (k, v) in super().decode(encoded).items()}


def totals(name: str, codecs: dict, protocol: ReadingProtocol, lengths=(24, 24, 24, 20)) -> dict[str, SequenceLoss]:
    found: dict[str, list[SequenceLoss]] = {}
    for scored in score_through_cache(
        Session(tiny_loaded(name), batch_size=2),
        random_sequences(*lengths),
        codecs,
        protocol,
    ):
        for codec, losses in scored.losses.items():
            found.setdefault(codec, []).extend(losses)
    add = lambda rows, field: sum(getattr(row, field) for row in rows)  # noqa: E731
    return {
        codec: SequenceLoss(**{field: add(rows, field) for field in ("tokens", "nll", "kl", "agree")})
        for codec, rows in found.items()
    }


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=ReadingProtocol.describe)
@pytest.mark.parametrize("name", MODELS)
def test_identity_changes_nothing_and_zeros_ruin(name: str, protocol: ReadingProtocol) -> None:
    if name == "qwen3_next":
        with pytest.raises(UnsupportedArchitectureError, match="not keys and values"):
            totals(name, {"identity": Identity()}, protocol)
        return
    scored = totals(name, {"identity": Identity(), "zeros": Zeros()}, protocol)
    assert scored["identity"].nll == scored[UNCOMPRESSED].nll
    assert scored["identity"].kl == pytest.approx(0, abs=1e-5)
    assert scored["identity"].agree == scored["identity"].tokens == scored[UNCOMPRESSED].tokens
    assert scored["zeros"].kl / scored["zeros"].tokens > 1e-3


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=ReadingProtocol.describe)
def test_the_uncompressed_score_is_that_of_a_plain_forward_pass(protocol: ReadingProtocol) -> None:
    loaded, sequences = tiny_loaded("llama"), random_sequences(24, 24)
    losses = [loss for s in score_through_cache(Session(loaded), sequences, {}, protocol) for loss in s.losses[UNCOMPRESSED]]
    for ids, loss in zip(sequences.ids, losses, strict=True):
        row = torch.from_numpy(ids)
        with torch.no_grad():
            logits = loaded.model(input_ids=row[None]).logits[0]
        expected = F.cross_entropy(logits[protocol.length : -1], row[protocol.length + 1 :], reduction="sum")
        assert loss.tokens == 24 - 1 - protocol.length
        assert loss.nll == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "deepseek_v2"])
def test_noise_costs_more_the_more_there_is(name: str) -> None:
    shares = (0.01, 0.1, 0.5, 2.0)
    scored = totals(name, {str(share): Noise(share=share) for share in shares}, PROTOCOLS[0], lengths=(64,) * 8)
    divergences = [scored[str(share)].kl for share in shares]
    assert divergences == sorted(divergences)
    assert divergences[-1] > 20 * divergences[0]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text", "deepseek_v2"])
def test_a_step_is_a_prefix_of_every_length_that_is_scored_up_to_the_next(name: str) -> None:
    loaded, sequences, codecs = tiny_loaded(name), random_sequences(24, 24), {"noise": Noise(share=0.3)}
    step = ReadingProtocol(kind="prefix", length=12, step=5)
    (stepped,) = score_through_cache(Session(loaded), sequences, codecs, step)
    sums, tokens = np.zeros((2, 2)), 0
    for start, stop in ((12, 17), (17, 22), (22, 23)):
        text = replace(sequences, ids=[ids[: stop + 1] for ids in sequences.ids])
        (once,) = score_through_cache(Session(loaded), text, codecs, ReadingProtocol(kind="prefix", length=start))
        sums += [[loss.nll, loss.kl] for loss in once.losses["noise"]]
        tokens += once.losses["noise"][0].tokens
    losses = stepped.losses["noise"]
    assert [loss.tokens for loss in losses] == [tokens, tokens] == [11, 11]
    np.testing.assert_allclose([[loss.nll, loss.kl] for loss in losses], sums, rtol=1e-4, atol=1e-5)
    assert stepped.held["noise"][0] == 2 * 22


def test_what_is_held_is_counted_over_all_rows() -> None:
    (scored,) = score_through_cache(
        Session(tiny_loaded("llama")),
        random_sequences(24, 24),
        {"16": SixteenBit()},
        ReadingProtocol(kind="prefix", length=12),
    )
    per_token = 3 * 2 * 2 * 16 * 2  # layers, slots, KV heads, head_dim, bytes
    assert scored.held["16"] == (2 * 12, 2 * 12 * per_token)


def test_batches_can_be_left_out() -> None:
    loaded, sequences = tiny_loaded("llama"), random_sequences(24, 24, 24, 20)
    options = {"codecs": {}, "protocol": PROTOCOLS[0]}
    session = Session(loaded, batch_size=2)
    whole = list(score_through_cache(session, sequences, **options))
    assert len(whole) == 3  # two of 24, one of 24, one of 20
    assert [s.losses for s in score_through_cache(session, sequences, **options, skip=1)] == [s.losses for s in whole[1:]]


def test_pieces_cover_the_text_once() -> None:
    for protocol in PROTOCOLS:
        for length in range(protocol.length + 2, 40):
            edges = pieces(length, protocol)
            assert edges[0] == (0, protocol.length)
            assert [start for start, _ in edges[1:]] == [stop for _, stop in edges[:-1]]
            assert edges[-1][1] == length
            assert all(stop - start >= 1 for start, stop in edges)


def test_texts_too_short_and_broken_codecs_are_named() -> None:
    with pytest.raises(CorpusError, match="every sequence has fewer than 14 tokens: the first 12 are not scored"):
        totals("llama", {}, PROTOCOLS[0], lengths=(13, 12))
    with pytest.raises(NonFiniteError, match="cache of broken"):
        totals("llama", {"broken": NaNs()}, PROTOCOLS[0])


def test_comparison_agrees_with_numpy() -> None:
    rng = np.random.default_rng(0)
    p, q = (rng.normal(size=(2, 600, 11)) for _ in range(2))
    targets = rng.integers(0, 11, (2, 599))
    log = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))  # noqa: E731
    p_log, q_log = log(p)[:, :599], log(q)[:, :599]
    expected = [
        -np.take_along_axis(q_log, targets[..., None], -1).sum((1, 2)),
        (np.exp(p_log) * (p_log - q_log)).sum((1, 2)),
        (p_log.argmax(-1) == q_log.argmax(-1)).sum(1),
    ]
    found = compared(torch.from_numpy(p), torch.from_numpy(q), torch.from_numpy(targets))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def losses(values: np.ndarray) -> list[SequenceLoss]:
    return [SequenceLoss(tokens=10, nll=float(v), kl=1.0, agree=9) for v in values]


def test_a_summary_adds_up_and_its_interval_holds_the_truth() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(30, 5, 200)
    quality = summarize(
        "c",
        losses(base + rng.normal(0.2, 0.5, 200)),
        losses(base),
        encoded_tokens=100,
        encoded_nbytes=5_000,
        values_per_token=64,
        basis_nbytes=7,
    )
    assert quality.delta_nll == pytest.approx(0.02, abs=0.01)
    assert quality.delta_nll_interval is not None
    low, high = quality.delta_nll_interval
    assert low < 0.02 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.05 / 200**0.5, rel=0.2)  # paired: the texts' own spread is gone
    assert (quality.kl, quality.top1_agreement) == (pytest.approx(0.1), pytest.approx(0.9))
    assert quality.compression_ratio == pytest.approx(2 * 64 * 100 / 5_000)
    assert quality.perplexity_increase == pytest.approx(np.exp(quality.delta_nll) - 1)


def test_few_sequences_have_no_interval() -> None:
    assert paired_interval(np.ones(7), np.ones(7)) is None
    assert paired_interval(np.ones(8), np.ones(8)) == (1.0, 1.0)


def test_more_tokens_than_the_model_has_positions_are_refused():
    loaded = tiny_loaded("gpt2")
    positions = loaded.model.config.max_position_embeddings
    scored = score_through_cache(
        Session(loaded), random_sequences(positions + 8), {}, ReadingProtocol(kind="prefix", length=8)
    )
    with pytest.raises(ModelError, match=f"{positions} positions"):
        next(scored)
    with pytest.raises(ModelError, match=f"{positions} positions"):  # a study asks before it fits
        scored_batches(Session(loaded), random_sequences(positions + 8), PROTOCOLS[0])
