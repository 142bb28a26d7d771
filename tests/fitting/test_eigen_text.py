"""What tokens predict of the first stage: features by rank, planted relations found, and tokens found in vectors."""

from types import SimpleNamespace

import pytest
import torch

from eigen_chain import TableFeatures
from eigencache.calibration.vectors import SampledVectors
from eigencache.fitting.token_predictor import MAX_FEATURES, fit_text, previous, vocabulary
from eigencache.fitting.weighed_vectors import WeighedVectors
from planted_eigen import LAYOUT, WIDTH, gaussian
from stub_codecs import tiny_loaded


def test_features_are_by_rank_and_centered_where_tokens_are_as_often_as_in_the_text() -> None:
    loaded, ids = tiny_loaded("llama"), torch.tensor([5] * 9 + [3] * 4 + [7])
    ranks, features = vocabulary(loaded, ids)
    assert ranks[[5, 3, 7]].tolist() == [0, 1, 2] and sorted(ranks.tolist()) == list(range(len(ranks)))
    assert features.vocabulary == len(ranks)
    torch.testing.assert_close(features.of(ranks[ids]).mean(0), torch.zeros(features.size), rtol=0, atol=2e-3)
    weights = loaded.model.get_input_embeddings().weight.detach()
    unit = torch.nn.functional.normalize(weights, dim=-1) * weights.shape[1] ** 0.5
    torch.testing.assert_close(features.of(ranks[[5]]) - features.of(ranks[[3]]), unit[[5]] - unit[[3]], rtol=0, atol=1e-2)


def test_wide_embeddings_are_cut_to_the_directions_that_the_text_uses() -> None:
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    embedding = torch.nn.Embedding.from_pretrained(weight)
    own = SimpleNamespace(model=SimpleNamespace(get_input_embeddings=lambda: embedding), embedded_ids=300)
    ids = torch.arange(100).repeat(3)
    ranks, features = vocabulary(own, ids)  # type: ignore[arg-type]
    assert (features.vocabulary, features.size) == (300, MAX_FEATURES)
    unit = torch.nn.functional.normalize(weight, dim=-1) * 20
    distances, expected = (torch.cdist(x, x) for x in (features.of(ranks[:100]), unit[:100]))
    torch.testing.assert_close(distances, expected, rtol=1e-2, atol=0.1)  # a hundred tokens span less than 256


def test_the_token_before_is_that_of_the_same_sequence() -> None:
    features = torch.arange(1.0, 7)[:, None]
    assert previous(features, (3, 1, 2)).flatten().tolist() == [0, 1, 2, 0, 0, 5]


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("stop", [WIDTH // 2, WIDTH])
def test_what_is_linear_in_the_tokens_is_predicted_and_its_tokens_found(stop: int, weighed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    features, here, before = draw(50, 8), draw(8, WIDTH), draw(8, WIDTH)
    before[:, :24] = 0  # what the first layer holds depends on the token alone
    lengths, block = (40,) * 50, 40
    ranks = torch.randint(50, (2000,), generator=generator)
    features = (features - features[ranks].mean(0)).half()
    f = features[ranks].float()
    x = f @ here + previous(f, lengths) @ before
    blocks = tuple(torch.diag_embed(0.1 + draw(2, 6).abs()) for _ in LAYOUT.parts) if weighed else ()
    rank_of = torch.randperm(50, generator=generator)
    samples = SampledVectors(LAYOUT, x, rank_of.argsort()[ranks], lengths)
    vectors = WeighedVectors(samples, 0, x.mean(0), blocks)
    text = fit_text(vectors, rank_of, TableFeatures(features), stop)  # type: ignore[arg-type]
    assert torch.equal(vectors.ranks(text), ranks)
    predicted, z = vectors.predicted(text, ranks, block), vectors.columns(0, stop)
    assert predicted.shape == z.shape == (2000, stop)
    assert float((predicted - z).square().mean() / z.square().mean()) < 2e-3
    rows = text.predict(ranks.view(50, 40), block).flatten(0, 1)
    torch.testing.assert_close(predicted, rows)


def test_sequences_are_predicted_without_their_first_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(50, (400,), generator=generator)
    features = torch.randn(50, 8, generator=generator).half()
    x = features[ranks].float() @ torch.randn(8, WIDTH, generator=generator)
    vectors = WeighedVectors(SampledVectors(LAYOUT, x, ranks, (40,) * 10), 4, x.mean(0), ())
    text = fit_text(vectors, torch.arange(50), TableFeatures(features), WIDTH)  # type: ignore[arg-type]
    assert torch.equal(vectors.ranks(text), ranks.view(10, 40)[:, 4:].flatten())
    expected = text.predict(ranks.view(10, 40)[:, 4:], 16).flatten(0, 1)
    torch.testing.assert_close(vectors.predicted(text, vectors.ranks(text), 16), expected)


def test_what_tokens_say_nothing_of_is_predicted_as_next_to_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(50, (4000,), generator=generator)
    vectors = WeighedVectors(SampledVectors(LAYOUT, gaussian(4000, 5), ranks, (40,) * 100), 0, torch.zeros(WIDTH), ())
    features = TableFeatures(torch.randn(50, 8, generator=generator).half())
    text = fit_text(vectors, torch.arange(50), features, WIDTH)  # type: ignore[arg-type]
    predicted = text.predict(ranks.view(100, 40), 40)
    assert float(predicted.square().mean() / vectors.columns(0, WIDTH).square().mean()) < 0.02
